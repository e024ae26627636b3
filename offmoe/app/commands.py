"""Commands of a chat. Their texts are arguments and no docstrings, which `python -OO` drops."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from offmoe.app.answer_printer import REASONING_MODES
from offmoe.app.attachments import read_attachment
from offmoe.app.chat_store import find_chat, kept_chats
from offmoe.app.conversation import Conversation, load_conversation
from offmoe.app.report import STATS_MODES, chats_table, help_table, stats_table
from offmoe.app.session import Session
from offmoe.app.set_option import field_type, split_assignment, with_value
from offmoe.errors import OffmoeError

KEYS = """\
Ctrl-C stops an answer, Ctrl-D exits, Ctrl-Z suspends, Alt-Enter inserts a new line, Tab completes
\"\"\" begins and ends a message of several lines, @FILE adds a text file, // begins a message with /"""
NO_FILE = "the file name is missing: give one, as in {}"


class ExitChat(Exception):
    """Raised by /exit."""


@dataclass(frozen=True)
class Command:
    """A command: `run(session, argument)`. Without a `usage` it takes no argument."""

    run: Callable[[Session, str], None]
    usage: str
    text: str
    aliases: tuple[str, ...] = ()


def show_help(session: Session, _: str) -> None:
    session.ui.show(help_table([(f"/{name}", description(command)) for name, command in COMMANDS.items()]))
    session.ui.show(KEYS)


def description(command: Command) -> str:
    """Return a command's argument, effect and other names."""
    others = ", ".join(f"/{alias}" for alias in command.aliases)
    return " ".join(filter(None, (command.usage, command.text, others and f"({others})")))


def stats(session: Session, mode: str) -> None:
    if mode:
        if mode not in STATS_MODES:
            raise OffmoeError(f"stats is {mode!r}: expected {', '.join(STATS_MODES)}")
        session.stats_mode = mode
        session.ui.note(f"stats: {mode}")
        return
    if not session.answers:
        raise OffmoeError("there is no answer yet: send a message first")
    session.ui.show(stats_table(session.answers))
    session.ui.show(session.engine.plan.summary())


def clear(session: Session, _: str) -> None:
    if not session.may_leave():
        return
    kept = session.store.path if session.store else None
    session.conversation = Conversation(session.conversation.system)
    session.attachments.clear()
    session.engine.reset()
    if session.store:
        session.store.begin()
    session.ui.note(f"a new conversation; the last one is kept: /load {kept.stem}" if kept else "a new conversation")


def system(session: Session, text: str) -> None:
    if text:
        session.conversation.system = None if text == "none" else text
        session.keep()
    session.ui.note(f"system prompt: {session.conversation.system or 'none'}")


def set_option(session: Session, argument: str) -> None:
    name, value = split_assignment(argument) if argument else ("", "")
    if name in OTHER_OPTIONS:
        OTHER_OPTIONS[name](session, value)
        return
    if name == "greedy":
        session.sampling, name = replace(session.sampling, temperature=0.0), "temperature"
    elif value:
        session.sampling = with_value(session.sampling, name, value)
    chosen = session.sampling.merged(session.engine.sampling)
    names = {name: field_type(name)} if name else vars(chosen)
    session.ui.note(", ".join(f"{name}={getattr(chosen, name)}" for name in names))


def think(session: Session, value: str) -> None:
    if value:
        chosen = None if value == "none" else value
        session.engine.think(chosen)
        session.thinking = chosen
    session.ui.note(f"thinking: {session.thinking or 'default of the template'}")


def reasoning(session: Session, mode: str) -> None:
    if mode == "show":
        if not session.last_reasoning:
            raise OffmoeError("the last answer has no reasoning")
        session.ui.write_reasoning(session.last_reasoning + "\n")
        return
    if mode and mode not in REASONING_MODES:
        raise OffmoeError(f"reasoning is {mode!r}: expected {', '.join(REASONING_MODES)} or show")
    session.reasoning_mode = mode or session.reasoning_mode
    session.ui.note(f"reasoning: {session.reasoning_mode}")


def retry(session: Session, _: str) -> None:
    ask_again(session, lambda message: message)


def edit(session: Session, _: str) -> None:
    ask_again(session, session.ui.edit)


def ask_again(session: Session, change: Callable[[str], str | None]) -> None:
    """Answer the last message again, as `change` returns it; None leaves everything as it was, as does an error."""
    before = list(session.conversation.turns)
    message = change(session.conversation.take_last())
    try:
        if message is None or not message.strip():
            session.conversation.turns = before
            session.ui.note("nothing changed")
        else:
            session.reply_to(message)
    except OffmoeError:
        session.conversation.turns = before
        session.keep()
        raise


def undo(session: Session, _: str) -> None:
    message = session.conversation.take_last()
    session.keep()
    session.ui.note(f"removed with its answer: {clip(message)}")


def read(session: Session, name: str) -> None:
    if not name:
        raise OffmoeError(NO_FILE.format("/read notes.txt"))
    session.attachments.append(read_attachment(name))
    session.ui.note(f"goes with the next message: {session.attachments[-1].summary}")


def save(session: Session, name: str) -> None:
    if not name:
        raise OffmoeError(NO_FILE.format("/save chat.json"))
    path = Path(os.path.expanduser(name))
    if path.is_file() and not (session.ui.interactive and session.ui.confirm(f"{name} exists. Overwrite it?")):
        raise OffmoeError(f"{name} exists: choose another name")
    session.conversation.save(path, session.model)
    session.saved = Conversation(session.conversation.system, list(session.conversation.turns))
    session.ui.note(f"saved: {name}")


def load(session: Session, name: str) -> None:
    if not name:
        raise OffmoeError(NO_FILE.format("/load chat.json"))
    path = find_chat(name)
    conversation, model = load_conversation(path, session.model, session.engine.config.vocab)
    if session.may_leave():
        continue_chat(session, conversation, model, path)


def continue_chat(session: Session, conversation: Conversation, model: str, path: Path) -> None:
    """Go on with a loaded conversation, and show its end."""
    turns = conversation.turns
    session.conversation = conversation
    session.saved = Conversation(conversation.system, list(turns))
    if session.store:
        session.store.begin(path if path.parent == session.store.folder else None)
    session.ui.note(
        f"{path.stem}: {len(turns)} messages"
        + (f", system prompt: {clip(conversation.system)}" if conversation.system else "")
    )
    if model != session.model:
        session.ui.note(f"it was written with another model, {model}: its text is encoded again")
    for turn in turns[-2:]:
        session.ui.note(f"{'›' if turn['role'] == 'user' else ' '} {clip(turn['content'], 400)}")
    if turns and turns[-1]["role"] == "user":
        session.ui.note("the last message has no answer: /retry answers it, another message replaces it")


def chats(session: Session, _: str) -> None:
    session.ui.show(chats_table(list(kept_chats())))


def clip(text: str, length: int = 60) -> str:
    """Return the beginning of a text."""
    text = text.strip()
    return text if len(text) <= length else f"{text[:length].rstrip()} …"


def leave(session: Session, _: str) -> None:
    raise ExitChat


COMMANDS = {
    "help": Command(show_help, "", "list the commands", ("?", "h")),
    "retry": Command(retry, "", "answer the last message again", ("regenerate",)),
    "edit": Command(edit, "", "change the last message and answer it again"),
    "undo": Command(undo, "", "remove the last message and its answer"),
    "clear": Command(clear, "", "begin a new conversation; the system prompt is kept", ("reset", "new")),
    "read": Command(read, "FILE", "add a text file to the next message", ("file",)),
    "system": Command(system, "[TEXT]", 'show or set the system prompt; "none" removes it'),
    "set": Command(set_option, "[NAME VALUE]", 'show or set an option of --help; "none" restores its default'),
    "think": Command(think, "[on|off|WORD]", 'show or set how much the model thinks; "none" restores the default'),
    "reasoning": Command(reasoning, "[dim|fold|hide|show]", 'display of reasoning; "show" prints the last one'),
    "stats": Command(stats, "[line|short|off]", "statistics and placement, or what is displayed after an answer"),
    "save": Command(save, "FILE", "save the conversation"),
    "load": Command(load, "FILE|NAME", "continue a saved or kept conversation"),
    "chats": Command(chats, "", "list the kept conversations", ("list",)),
    "exit": Command(leave, "", "exit the chat", ("quit", "bye", "q")),
}
OTHER_OPTIONS = {"system": system, "think": think, "reasoning": reasoning, "stats": stats}
BY_NAME = {name: command for first, command in COMMANDS.items() for name in (first, *command.aliases)}
