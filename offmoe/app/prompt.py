"""The prompt of a chat at a terminal: editing, history, completion, and what keys and signals do to it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from offmoe.app.completion import ChatCompleter
from offmoe.app.echo import echo
from offmoe.app.signals import ChatSignals
from offmoe.app.terminal import UI, Pipe, Screen
from offmoe.app.user_folders import open_state_folder
from offmoe.errors import OffmoeError

HINT = "Send a message (/help for help)"
SETTLE_S = 1.0  # a Ctrl-C this soon after an answer, or after another such Ctrl-C, was for the answer
BLOCK = '"""'  # begins and ends a message of several lines


class Terminal(Screen):
    """An interactive terminal. Ctrl-C ends an answer or clears the line, Ctrl-D ends the chat, Ctrl-Z suspends it."""

    interactive = commands = True

    def __init__(self, signals: ChatSignals, plain: bool = False, keep: bool = True) -> None:
        """`keep`: whether inputs are kept in a file."""
        super().__init__(plain)
        self.signals = signals
        self._later: list[str] = []  # notes that would disturb a prompt
        self.session = prompt_session(open_history(self._later.append) if keep else InMemoryHistory())
        self._answered = 0.0  # monotonic time of the first prompt after an answer
        self._answering = False
        self.exit_armed = False  # Ctrl-C was pressed at an empty prompt: the next one exits

    def ask(self) -> str | None:
        if self._answering:
            self._answering, self._answered = False, time.monotonic()
        while True:
            while self._later:
                self.note(self._later.pop(0))
            try:
                text = self._prompt(self.session, "› ", placeholder=FormattedText([("fg:ansibrightblack", HINT)]))
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self._ends_at_ctrl_c():
                    return None
                continue
            self.exit_armed = False
            return text

    def edit(self, text: str) -> str | None:
        try:
            return self._prompt(self.session, "› ", default=text)
        except (EOFError, KeyboardInterrupt):
            return None

    def confirm(self, question: str) -> bool:
        try:  # input() would mistake a late cursor report for a reply
            reply = self._prompt(PromptSession(), f"{question} [Y/n] ")
        except (EOFError, KeyboardInterrupt):
            return False
        return reply.strip().lower() in ("", "y", "yes")

    @contextmanager
    def answering(self, stop: Callable[[], None], paused: Callable[[float], None]) -> Iterator[None]:
        self._answering = True
        with self.signals.answering(stop, paused), echo(on=False):
            yield

    def write(self, text: str) -> None:
        if self.signals.resumed():
            self.moved()
        super().write(text)

    def _prompt(self, session: PromptSession[str], message: str, **options: Any) -> str:
        with self.signals.prompting(lambda error: wake(session, error)):
            if not self.console.is_dumb_terminal:
                self.status("")  # erases the ^C that the terminal echoed before the prompt
            return session.prompt(message, handle_sigint=False, enable_suspend=True, pre_run=self._check, **options)

    def _check(self) -> None:
        """End a prompt that begins after the signal that ends the chat."""
        if ended := self.signals.due():
            get_app().exit(exception=ended)

    def _ends_at_ctrl_c(self) -> bool:
        """Clear the line, or warn at an empty prompt; return True if this is the second Ctrl-C there, which exits."""
        now = time.monotonic()
        if now - self._answered < SETTLE_S:
            self._answered = now
            return False
        empty = not self.session.default_buffer.text.strip()
        exits = empty and self.exit_armed
        self.exit_armed = empty
        if empty and not exits:
            self.note("press Ctrl-C again or Ctrl-D to exit")
        return exits


def wake(session: PromptSession[str], error: BaseException) -> None:
    """End a prompt with an exception, from a signal handler."""
    app = session.app

    def end() -> None:
        if app.is_running and not app.is_done:
            app.exit(exception=error)

    if app.loop is not None:  # else it begins, and checks then, or has ended
        app.loop.call_soon_threadsafe(end)


def choose_ui(signals: ChatSignals, commands: bool, plain: bool, keep: bool) -> UI:
    """Return a Terminal if standard input and output both are terminals, else a Pipe.

    A Pipe runs commands if a person types at a terminal, or if `commands` says so.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return Terminal(signals, plain, keep)
    return Pipe(commands or sys.stdin.isatty())


def prompt_session(history: History) -> PromptSession[str]:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=history,
        completer=ChatCompleter(),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=Condition(lambda: in_block(get_app().current_buffer.text)),
        prompt_continuation="  ",
    )


def in_block(text: str) -> bool:
    """Return whether `text` begins a block of lines, at its start or after a command, that is not closed."""
    begin = re.match(rf"\s*(?:/[a-z]+\s+)?{BLOCK}", text)
    return begin is not None and BLOCK not in text[begin.end() :]


class SafeHistory(FileHistory):
    """Inputs in a file. If it cannot be written (any more), `note` is called once and inputs are kept in memory."""

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        super().__init__(path)
        self._note: Callable[[str], None] | None = note

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError as error:
            self._fail(error)
            return []

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self._note:
            self._note(f"the input history is not kept: {self.filename!s}: {error.strerror}")
            self._note = None


def open_history(note: Callable[[str], None]) -> History:
    """Return the history of inputs, in a file that only its owner can read; in memory, with a note, if there can be
    none.
    """
    try:
        path = open_state_folder() / "history"
        if path.exists() and not path.is_file():
            raise OffmoeError(f"{path} is not a regular file")
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
    except OffmoeError as error:
        note(f"the input history is not kept: {error}")
    except OSError as error:
        note(f"the input history is not kept: {error.filename}: {error.strerror}")
    else:
        return SafeHistory(path, note)
    return InMemoryHistory()
