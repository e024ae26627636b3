"""An answer as it comes: its text, and its reasoning dim, folded into one line or hidden."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offmoe.app.terminal import Output
    from offmoe.engine import Piece

DIM, FOLD, HIDE = MODES = ("dim", "fold", "hide")


class Answer:
    """`text` and `reasoning` so far. out: where they are shown; None: nowhere."""

    def __init__(self, out: Output | None, mode: str = DIM, unfold: str = "") -> None:
        """unfold: how a person sees what was folded."""
        self.text = self.reasoning = ""
        self._out, self._mode, self._unfold = out, mode, unfold
        self._tokens = 0  # of the reasoning
        self._began = 0.0
        self._open = False  # reasoning stands on the screen and has not ended

    def take(self, piece: Piece) -> None:
        if piece.reasoning:
            self._think(piece)
        else:
            self._say(piece.text)

    def end(self) -> None:
        """No more comes."""
        self._close("\n")
        if self._out:
            self._out.write("\n")

    def _think(self, piece: Piece) -> None:
        self._began = self._began or time.monotonic()
        self._tokens += piece.token is not None
        self.reasoning += piece.text
        if not self._out or self._mode == HIDE:
            return
        self._open |= bool(piece.text)
        if self._mode == DIM:
            self._out.think(piece.text)
        elif self._open:
            self._out.status(f"▸ thinking · {self._tokens} tokens")

    def _say(self, text: str) -> None:
        if text:
            self._close("\n\n")
        self.text += text
        if self._out:
            self._out.write(text)

    def _close(self, gap: str) -> None:
        """End what is shown of the reasoning. gap: before what follows dim text."""
        if not self._open or not self._out:
            return
        self._open = False
        if self._mode == DIM:
            self._out.think(gap)
            return
        seconds = time.monotonic() - self._began
        self._out.status("")
        self._out.note(f"▸ thought for {self._tokens} tokens, {seconds:.1f} s{self._unfold}")
