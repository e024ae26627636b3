"""Completion at a chat's prompt: commands, their arguments, options of /set, names of files and chats."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from offmoe.app.answer_printer import REASONING_MODES
from offmoe.app.chat_store import kept_chats
from offmoe.app.commands import COMMANDS, OTHER_OPTIONS
from offmoe.app.report import STATS_MODES
from offmoe.app.set_option import NAMES
from offmoe.errors import OffmoeError

COMMAND = re.compile(r"/(\S+)\s+(.*)", re.DOTALL)
MENTION = re.compile(r"(?:^|\s)@(\S*)$")
WORDS = {
    "set": (*NAMES, *OTHER_OPTIONS),
    "think": ("on", "off", "none"),
    "reasoning": (*REASONING_MODES, "show"),
    "stats": STATS_MODES,
}
FILES = ("read", "save", "load")


class ChatCompleter(Completer):
    """Completes a command's name, then its argument; in a message, the name of a file after @."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if mention := MENTION.search(text):
            yield from self._complete_path(mention[1], complete_event)
        elif re.fullmatch(r"/[a-z]*", text):
            yield from matching((f"/{name}" for name in COMMANDS), text)
        elif command := COMMAND.fullmatch(text):
            name, argument = command[1], command[2]
            yield from matching(WORDS.get(name, ()), argument)
            if name == "load":
                yield from matching(chat_names(), argument)
            if name in FILES:
                yield from self._complete_path(argument, complete_event)

    def _complete_path(self, path: str, event: CompleteEvent) -> Iterable[Completion]:
        return self._paths.get_completions(Document(path, len(path)), event)


def matching(words: Iterable[str], start: str) -> Iterable[Completion]:
    """Yield the words that begin with `start`."""
    return (Completion(word, -len(start)) for word in words if word.startswith(start))


def chat_names() -> list[str]:
    """Return the names of the kept chats."""
    try:
        return [chat.name for chat in kept_chats()]
    except OffmoeError:
        return []
