"""A chat's user interface without a screen: its input is a list of lines, its output is collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Script:
    """A user interface whose input is `lines`."""

    def __init__(self, *lines: str, interactive: bool = True, agrees: bool = True) -> None:
        self.lines, self.interactive, self.agrees = list(lines), interactive, agrees
        self.commands, self.width = True, None
        self.answers, self.notes, self.shown, self.questions = "", [], [], []
        self.thoughts, self.statuses, self.edited = "", [], []

    def ask(self) -> str | None:
        return self.lines.pop(0) if self.lines else None

    def edit(self, text: str) -> str | None:
        """Take the next line in place of `text`; "" for None."""
        self.edited.append(text)
        return self.lines.pop(0) or None

    @contextmanager
    def answering(self, stop: Callable[[], None], paused: Callable[[float], None]) -> Iterator[None]:
        yield

    def confirm(self, question: str) -> bool:
        self.questions.append(question)
        return self.agrees

    def write(self, text: str) -> None:
        self.answers += text

    def write_reasoning(self, text: str) -> None:
        self.thoughts += text

    def end_answer(self) -> None:
        self.answers += "\n"

    def status(self, text: str) -> None:
        self.statuses.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, table: Any) -> None:
        self.shown.append(table)
