"""Print an answer while it is generated; its reasoning is dim, folded into one line, or hidden."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offmoe.app.terminal import Output
    from offmoe.engine import Piece

DIM, FOLD, HIDE = REASONING_MODES = ("dim", "fold", "hide")


class AnswerPrinter:
    """Collects an answer's `text` and `reasoning` and prints them to `out`, or nowhere if `out` is None."""

    def __init__(self, out: Output | None, mode: str = DIM, hint: str = "") -> None:
        """`mode` is one of REASONING_MODES. `hint` is appended to the line that stands for folded reasoning."""
        self.text = self.reasoning = ""
        self._out, self._mode, self._hint = out, mode, hint
        self._reasoning_tokens = 0
        self._started = 0.0  # monotonic time of the first reasoning token
        self._reasoning_open = False  # whether the screen shows unfinished reasoning

    def add(self, piece: Piece) -> None:
        """Print the next piece of the answer."""
        if piece.reasoning:
            self._add_reasoning(piece)
        else:
            self._add_text(piece.text)

    def finish(self) -> None:
        """End the answer's last line."""
        self._end_reasoning("\n")
        if self._out:
            self._out.end_answer()

    def _add_reasoning(self, piece: Piece) -> None:
        self._started = self._started or time.monotonic()
        self._reasoning_tokens += piece.token is not None
        self.reasoning += piece.text
        if not self._out or self._mode == HIDE:
            return
        self._reasoning_open |= bool(piece.text)
        if self._mode == DIM:
            self._out.write_reasoning(piece.text)
        elif self._reasoning_open:
            self._out.status(f"▸ thinking · {self._reasoning_tokens} tokens")

    def _add_text(self, text: str) -> None:
        if text:
            self._end_reasoning("\n\n")
        self.text += text
        if self._out and text:
            self._out.write(text)

    def _end_reasoning(self, separator: str) -> None:
        """End the printed reasoning; `separator` goes between dim reasoning and what follows."""
        if not self._reasoning_open or not self._out:
            return
        self._reasoning_open = False
        if self._mode == DIM:
            self._out.write_reasoning(separator)
            return
        seconds = time.monotonic() - self._started
        self._out.status("")
        self._out.note(f"▸ thought for {self._reasoning_tokens} tokens, {seconds:.1f} s{self._hint}")
