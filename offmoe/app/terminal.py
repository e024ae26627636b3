"""Output to the screen: a terminal with colour, or a pipe without it. `prompt.py` adds line editing."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from offmoe.app.signals import interruptible
from offmoe.text.read_text import decode_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from offmoe.app.markdown import MarkdownWriter
    from offmoe.app.wrap import WordWrapper

Progress = Callable[[str, int, int], None]  # (description, amount done, total)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 except \t \n, DEL, C1: a model could move the cursor


class Output(Protocol):
    """Destination of an answer."""

    def write(self, text: str) -> None:
        """Write a piece of the answer."""

    def write_reasoning(self, text: str) -> None:
        """Write a piece of the reasoning before the answer."""

    def end_answer(self) -> None:
        """Write what was held back, and end the answer's last line."""

    def status(self, text: str) -> None:
        """Replace the current status line by `text`; "" removes it."""

    def note(self, text: str) -> None:
        """Print a line about the answer or the machine; it is never part of the answer."""


class UI(Output, Protocol):
    """Output of a chat, and the questions it asks its user."""

    interactive: bool  # whether a person can be asked; if so, the chat continues after an error
    commands: bool  # whether a line of input may be a command: text from a pipe is only text

    @property
    def width(self) -> int | None:
        """Columns of the screen, or None without one."""

    def ask(self) -> str | None:
        """Return the next message or command, or None at the end of the input."""

    def edit(self, text: str) -> str | None:
        """Let the user change `text`; return None if it is to stay as it was."""

    def confirm(self, question: str) -> bool: ...

    def answering(self, stop: Callable[[], None], paused: Callable[[float], None]) -> AbstractContextManager[None]:
        """Let Ctrl-C call `stop` while the block runs, and `paused` learn of seconds in which it was suspended."""

    def show(self, table: RenderableType) -> None: ...


class Pipe:
    """Not a terminal: answers go to stdout, everything else to stderr, and no questions are asked."""

    interactive = False
    width: int | None = None

    def __init__(self, commands: bool = False) -> None:
        self.commands = commands
        self.offset = 0  # bytes of standard input before the current line

    def ask(self) -> str | None:
        line = sys.stdin.buffer.readline()
        text = decode_text(line, "standard input", self.offset).rstrip("\r\n")
        self.offset += len(line)
        return text if line else None

    def edit(self, text: str) -> str | None:
        return None

    def confirm(self, question: str) -> bool:
        return True

    def answering(self, stop: Callable[[], None], paused: Callable[[float], None]) -> AbstractContextManager[None]:
        return interruptible(stop)

    def write(self, text: str) -> None:
        sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def write_reasoning(self, text: str) -> None:
        sys.stderr.write(dim(clean(text)) if sys.stderr.isatty() else text)
        sys.stderr.flush()

    def end_answer(self) -> None:
        self.write("\n")

    def status(self, text: str) -> None:
        """Do nothing: a status line needs a terminal."""

    def note(self, text: str) -> None:
        print(clean(text), file=sys.stderr)

    def show(self, table: RenderableType) -> None:
        console().print(table)


class Screen:
    """A terminal: answers are rendered as Markdown, reasoning and notes are dim, and lines break between words."""

    def __init__(self, plain: bool = False) -> None:
        """`plain`: write an answer as it is, as on a terminal that cannot move its cursor."""
        self.console = console()
        self.plain = plain or self.console.is_dumb_terminal
        self._writer: MarkdownWriter | None = None
        self._wrapper: WordWrapper | None = None

    @property
    def width(self) -> int | None:
        return self.console.width

    def write(self, text: str) -> None:
        if self.plain:
            self._print(clean(text))
            return
        self._end_reasoning()
        if self._writer is None:
            from offmoe.app.markdown import MarkdownWriter

            self._writer = MarkdownWriter(self.console)
        self._writer.write(clean(text))

    def write_reasoning(self, text: str) -> None:
        if self.plain:
            self._print(dim(clean(text)))
            return
        if self._wrapper is None:
            from offmoe.app.wrap import WordWrapper

            self._wrapper = WordWrapper(lambda: self.console.width)
        self._print(dim(self._wrapper.push(clean(text))))

    def end_answer(self) -> None:
        self._end_reasoning()
        if self._writer is not None:
            self._writer.end()
            self._writer = None
        else:
            self._print("\n")

    def moved(self) -> None:
        """Begin a new line for what is drawn next: something else, such as a shell, has written to the screen."""
        if self._writer is not None:
            self._writer.forget()

    def status(self, text: str) -> None:
        self._print(f"\r\x1b[K{dim(clean(text)[: self.console.width - 1])}")

    def note(self, text: str) -> None:
        self._end_reasoning()
        self.console.print(clean(text), style="dim", markup=False, highlight=False, soft_wrap=self.plain)

    def show(self, table: RenderableType) -> None:
        self.console.print(table)

    def _end_reasoning(self) -> None:
        if self._wrapper is not None:
            self._print(dim(self._wrapper.flush()))
            self._wrapper = None

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def choose_output(plain: bool) -> Output:
    """Return the output of `offmoe run`: a Screen if stdout is a terminal, else a Pipe."""
    return Screen(plain) if sys.stdout.isatty() else Pipe()


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


def dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if text else ""


def clean(text: str) -> str:
    """Return `text` without control characters, except newline and tab."""
    return CONTROL.sub("", text)


def one_line(text: str) -> str:
    """Return `text` on one line without control characters."""
    return " ".join(clean(text.replace("\r", "\n")).split())
