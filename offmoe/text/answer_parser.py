"""An answer's ids taken apart as they come: whole characters, reasoning and answer, stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping

from offmoe.text.reasoning_parser import Part, Splitter, possible_start


class Detokenizer:
    """Ids in, text out as soon as its characters are whole. O(1) a token."""

    def __init__(self, piece: Callable[[int], bytes], starts_with_space: bool) -> None:
        """piece: an id's bytes. starts_with_space: a text's first space is not its own."""
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = starts_with_space

    def push(self, id: int) -> str:
        """What can be shown once `id` is there: never half a character."""
        return self._shown(self._decoder.decode(self._piece(id)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._shown(self._decoder.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class Speech:
    """An answer's ids in, parts of reasoning and of the answer out. Stop strings end the answer alone."""

    def __init__(self, stream: Detokenizer, marks: Mapping[int, str], splitter: Splitter, stops: StopStrings) -> None:
        self._stream, self._marks, self._splitter, self._stops = stream, marks, splitter, stops
        self.stopped = False  # a stop string has come

    @property
    def plain(self) -> bool:
        """Whether all was answer so far: no reasoning, no marks."""
        return self._splitter.plain

    @property
    def inside(self) -> bool:
        """Whether reasoning is under way."""
        return self._splitter.inside

    def push(self, id: int) -> list[Part]:
        mark = self._marks.get(id)
        text = self._stream.push(id) if mark is None else self._stream.flush() + mark
        return self._stop(self._splitter.push(text))

    def flush(self) -> list[Part]:
        """What was held back, when no more comes."""
        parts = self._stop([*self._splitter.push(self._stream.flush()), *self._splitter.flush()])
        held = self._stops.flush()
        return [*parts, (False, held)] if held else parts

    def _stop(self, parts: list[Part]) -> list[Part]:
        shown = []
        for reasoning, text in parts:
            if not reasoning:
                text, self.stopped = self._stops.push(text)
            if text:
                shown.append((reasoning, text))
        return shown


class StopStrings:
    """Ends a stream at the first stop string, also across pieces; holds back what may begin one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that can be shown now, whether a stop string has come)."""
        if self._stopped:
            return "", True
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:  # the one that is whole first: the cut does not depend on how the text came in pieces
            self._held, self._stopped = "", True
            return text[: min(ends)[1]], True
        keep = max((possible_start(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no more comes."""
        text, self._held = self._held, ""
        return text
