"""What touches the screen: a terminal with line editing and colour, or a pipe with neither."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from offmoe.errors import OffmoeError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from rich.console import Console, RenderableType

Progress = Callable[[str, int, int], None]  # what, done, of how many
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 without \t \n, DEL, C1: a model could move the cursor


class Output(Protocol):
    """Where an answer goes."""

    def write(self, text: str) -> None:
        """A piece of an answer."""

    def think(self, text: str) -> None:
        """A piece of the reasoning before it."""

    def status(self, text: str) -> None:
        """What is going on, in place of the last status; "" takes it away."""

    def note(self, text: str) -> None:
        """A line about the answer or the machine, never part of the answer."""


class UI(Output, Protocol):
    """The chat's other half: what it asks of a person and shows to them."""

    interactive: bool  # a person is there: ask them, and go on after an error

    def ask(self) -> str | None:
        """The next message or command; None: no more."""

    def confirm(self, question: str) -> bool: ...

    def show(self, table: RenderableType) -> None: ...


class Pipe:
    """Answers to stdout, everything about them to stderr, nobody to ask."""

    interactive = False

    def __init__(self) -> None:
        self.offset = 0  # bytes of standard input before this line

    def ask(self) -> str | None:
        line = sys.stdin.buffer.readline()
        text = decode(line, self.offset).rstrip("\r\n")
        self.offset += len(line)
        return text if line else None

    def confirm(self, question: str) -> bool:
        return True

    def write(self, text: str) -> None:
        sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def think(self, text: str) -> None:
        sys.stderr.write(dim(clean(text)) if sys.stderr.isatty() else text)
        sys.stderr.flush()

    def status(self, text: str) -> None:
        """Nobody watches."""

    def note(self, text: str) -> None:
        print(clean(text), file=sys.stderr)

    def show(self, table: RenderableType) -> None:
        console().print(table)


class Screen:
    """A terminal that a person reads: reasoning and notes are dim."""

    def __init__(self) -> None:
        self.console = console()

    def write(self, text: str) -> None:
        sys.stdout.write(clean(text))
        sys.stdout.flush()

    def think(self, text: str) -> None:
        sys.stdout.write(dim(clean(text)))
        sys.stdout.flush()

    def status(self, text: str) -> None:
        sys.stdout.write(f"\r\x1b[K{dim(clean(text))}")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        self.console.print(clean(text), style="dim", markup=False, highlight=False, soft_wrap=True)

    def show(self, table: RenderableType) -> None:
        self.console.print(table)


class Terminal(Screen):
    """A person at a terminal: history, completion of commands, multi-line paste."""

    interactive = True

    def __init__(self, commands: list[str]) -> None:
        super().__init__()
        self.session = prompt_session(commands)
        self.leaving = False  # Ctrl-C came at an empty prompt: the next one leaves

    def ask(self) -> str | None:
        while True:
            try:
                text = self.session.prompt("› ")
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self.interrupted():
                    return None
                continue
            self.leaving = False
            return text

    def interrupted(self) -> bool:
        """Ctrl-C at the prompt: clears a line, asks at an empty one, leaves the second time."""
        empty = not self.session.default_buffer.text.strip()
        leave = empty and self.leaving
        self.leaving = empty
        if empty and not leave:
            self.note("Ctrl-C again or Ctrl-D leaves")
        return leave

    def confirm(self, question: str) -> bool:
        from prompt_toolkit import prompt  # input() would take a late cursor report for a reply

        try:
            reply = prompt(f"{question} [Y/n] ")
        except (EOFError, KeyboardInterrupt):
            return False
        return reply.strip().lower() in ("", "y", "yes")


def choose_ui(commands: list[str]) -> UI:
    """A terminal where both ends are one."""
    return Terminal(commands) if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()


def console() -> Console:
    """On stdout; where that is no terminal, no escape codes whatever the environment asks for, and wide."""
    from rich.console import Console

    shown = sys.stdout.isatty()
    return Console(force_terminal=shown, width=None if shown else 160, highlight=False, markup=False, emoji=False)


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar on stderr while the block runs, nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task(label)

        def progress(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield progress


def prompt_session(commands: list[str]) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history = history_file()
    return PromptSession(
        history=FileHistory(history) if history else None,
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
    )


def history_file() -> Path | None:
    """Readable by its owner alone; None where the state directory cannot be written."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "offmoe" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.chmod(0o600)
        return path if os.access(path, os.W_OK) else None
    except OSError:
        return None


def choose_output() -> Output:
    """For one answer."""
    return Screen() if sys.stdout.isatty() else Pipe()


def dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if text else ""


def clean(text: str) -> str:
    """`text` without control characters, except newline and tab."""
    return CONTROL.sub("", text)


def one_line(text: str) -> str:
    """`text` as a person can read it on one line, whatever a file put into it."""
    return " ".join(clean(text.replace("\r", "\n")).split())


def decode(raw: bytes, offset: int = 0, source: str = "standard input") -> str:
    """UTF-8 from a person; an error names the first byte that is not, counted from `offset`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OffmoeError(
            f"{source} is no UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
        ) from None


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop` instead of tearing a step apart; the third one raises KeyboardInterrupt."""
    presses = 0

    def pressed(signum: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 2:
            raise KeyboardInterrupt
        stop()

    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
