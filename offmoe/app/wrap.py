"""Words of a streamed text, wrapped at the width of the screen."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len

PIECES = re.compile(r"\n|[ \t]+|[^\s]+|\s")
TAB = 8


class WordWrapper:
    """Inserts line breaks where a word would cross the right edge; a word is held back until its end is known.

    Only spaces are replaced by line breaks: a word longer than a line is left to the terminal.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        self._space = self._word = ""  # not emitted yet; the space is before the word

    def push(self, text: str) -> str:
        """Add text and return what can be displayed now."""
        return "".join(self._piece(piece) for piece in PIECES.findall(text))

    def flush(self) -> str:
        """Return the text held back, and begin at the start of a line."""
        text = self._place_word() + self._space
        self._space, self._column = "", 0
        return text

    def _piece(self, piece: str) -> str:
        if piece == "\n":
            text = self._place_word()
            self._space, self._column = "", 0
            return text + "\n"
        if piece.isspace():
            text = self._place_word()
            self._space += piece
            return text
        if cell_len(piece) == len(piece):
            self._word += piece
            return ""
        return "".join(self._character(char) for char in piece)

    def _character(self, char: str) -> str:
        """Add a character of a word that has wide ones: a line of Chinese or Japanese may break next to each."""
        wide = cell_len(char) > 1
        text = self._place_word() if wide else ""
        self._word += char
        return text + (self._place_word() if wide else "")

    def _place_word(self) -> str:
        """Return the pending space and word, with a line break in place of the space where the word does not fit."""
        if not self._word:
            return ""
        space, word, self._space, self._word = self._space, self._word, "", ""
        blank = sum(TAB if char == "\t" else 1 for char in space)
        length, width = cell_len(word), self._width()
        if self._column and self._column + blank + length > width:
            self._column = length % width if length > width else length
            return "\n" + word
        column = self._column + blank + length
        self._column = column if column <= width else column % width
        return space + word
