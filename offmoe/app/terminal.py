"""Output to the screen: a terminal with line editing and colour, or a pipe without them."""

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

Progress = Callable[[str, int, int], None]  # (description, amount done, total)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 except \t \n, DEL, C1: a model could move the cursor


class Output(Protocol):
    """Destination of an answer."""

    def write(self, text: str) -> None:
        """Write a piece of the answer."""

    def write_reasoning(self, text: str) -> None:
        """Write a piece of the reasoning before the answer."""

    def status(self, text: str) -> None:
        """Replace the current status line by `text`; "" removes it."""

    def note(self, text: str) -> None:
        """Print a line about the answer or the machine; it is never part of the answer."""


class UI(Output, Protocol):
    """Output of a chat, and the questions it asks its user."""

    interactive: bool  # whether a person can be asked; if so, the chat continues after an error

    def ask(self) -> str | None:
        """Return the next message or command, or None at the end of the input."""

    def confirm(self, question: str) -> bool: ...

    def show(self, table: RenderableType) -> None: ...


class Pipe:
    """Not a terminal: answers go to stdout, everything else to stderr, and no questions are asked."""

    interactive = False

    def __init__(self) -> None:
        self.offset = 0  # bytes of standard input before the current line

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

    def write_reasoning(self, text: str) -> None:
        sys.stderr.write(dim(clean(text)) if sys.stderr.isatty() else text)
        sys.stderr.flush()

    def status(self, text: str) -> None:
        """Do nothing: a status line needs a terminal."""

    def note(self, text: str) -> None:
        print(clean(text), file=sys.stderr)

    def show(self, table: RenderableType) -> None:
        console().print(table)


class Screen:
    """A terminal; reasoning and notes are dim."""

    def __init__(self) -> None:
        self.console = console()

    def write(self, text: str) -> None:
        sys.stdout.write(clean(text))
        sys.stdout.flush()

    def write_reasoning(self, text: str) -> None:
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
    """An interactive terminal: history, completion of commands, multi-line paste."""

    interactive = True

    def __init__(self, commands: list[str]) -> None:
        super().__init__()
        self.session = prompt_session(commands)
        self.exit_armed = False  # Ctrl-C was pressed at an empty prompt: the next one exits

    def ask(self) -> str | None:
        while True:
            try:
                text = self.session.prompt("› ")
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self.on_ctrl_c():
                    return None
                continue
            self.exit_armed = False
            return text

    def on_ctrl_c(self) -> bool:
        """Clear the line, or warn at an empty prompt; return True if this is the second Ctrl-C there, which exits."""
        empty = not self.session.default_buffer.text.strip()
        exits = empty and self.exit_armed
        self.exit_armed = empty
        if empty and not exits:
            self.note("press Ctrl-C again or Ctrl-D to exit")
        return exits

    def confirm(self, question: str) -> bool:
        from prompt_toolkit import prompt  # input() would mistake a late cursor report for a reply

        try:
            reply = prompt(f"{question} [Y/n] ")
        except (EOFError, KeyboardInterrupt):
            return False
        return reply.strip().lower() in ("", "y", "yes")


def choose_ui(commands: list[str]) -> UI:
    """Return a Terminal if standard input and output both are terminals, else a Pipe."""
    return Terminal(commands) if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()


def console() -> Console:
    """Return a rich console on stdout.

    Outside a terminal it is 160 wide and writes no escape codes, whatever the environment says.
    """
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    return Console(
        force_terminal=is_terminal, width=None if is_terminal else 160, highlight=False, markup=False, emoji=False
    )


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Show a progress bar on stderr while the block runs; show nothing if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task(label)

        def progress(description: str, done: int, total: int) -> None:
            bars.update(task, description=description, completed=done, total=total)

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
    """Return the history file, readable only by its owner, or None if the state directory is not writable."""
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
    """Return the output of `offmoe run`: a Screen if stdout is a terminal, else a Pipe."""
    return Screen() if sys.stdout.isatty() else Pipe()


def dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if text else ""


def clean(text: str) -> str:
    """Return `text` without control characters, except newline and tab."""
    return CONTROL.sub("", text)


def one_line(text: str) -> str:
    """Return `text` on one line without control characters."""
    return " ".join(clean(text.replace("\r", "\n")).split())


def decode(raw: bytes, offset: int = 0, source: str = "standard input") -> str:
    """Decode UTF-8 from the user. Raises OffmoeError that names the first invalid byte, counted from `offset`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OffmoeError(
            f"{source} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
        ) from None


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """Make Ctrl-C call `stop`, so that it does not interrupt a step; the third one raises KeyboardInterrupt."""
    presses = 0

    def on_sigint(signum: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 2:
            raise KeyboardInterrupt
        stop()

    previous = signal.signal(signal.SIGINT, on_sigint)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
