"""Turn an answer's token ids into text as they arrive: whole characters, reasoning and answer, stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping

from offmoe.text.reasoning_parser import Part, ReasoningParser, partial_match_length


class Detokenizer:
    """Incremental detokenizer: token ids in, text out as soon as its characters are complete. O(1) per token."""

    def __init__(self, token_bytes: Callable[[int], bytes], strip_leading_space: bool) -> None:
        """`token_bytes` returns a token's bytes. `strip_leading_space`: drop the first space of the text."""
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = strip_leading_space

    def push(self, id: int) -> str:
        """Add a token and return the text that is complete now, never half a character."""
        return self._strip_start(self._decoder.decode(self._token_bytes(id)))

    def flush(self) -> str:
        """Return the rest at the end; an incomplete character becomes U+FFFD."""
        return self._strip_start(self._decoder.decode(b"", final=True))

    def _strip_start(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class AnswerParser:
    """Token ids in, parts of reasoning and answer out. Stop strings apply to the answer only."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        markers: Mapping[int, str],
        reasoning: ReasoningParser,
        stops: StopStrings,
    ) -> None:
        self._detokenizer, self._markers, self._reasoning, self._stops = detokenizer, markers, reasoning, stops
        self.stopped = False  # whether a stop string was found

    @property
    def saw_no_marker(self) -> bool:
        """True if everything so far is answer, verbatim: no reasoning, no markers."""
        return self._reasoning.saw_no_marker

    @property
    def in_reasoning(self) -> bool:
        """True if the text is inside reasoning now."""
        return self._reasoning.in_reasoning

    def push(self, id: int) -> list[Part]:
        """Add a token and return the parts that are certain now."""
        marker = self._markers.get(id)
        text = self._detokenizer.push(id) if marker is None else self._detokenizer.flush() + marker
        return self._apply_stops(self._reasoning.push(text))

    def flush(self) -> list[Part]:
        """Return the text held back, at the end of the answer."""
        parts = self._apply_stops([*self._reasoning.push(self._detokenizer.flush()), *self._reasoning.flush()])
        pending = self._stops.flush()
        return [*parts, (False, pending)] if pending else parts

    def _apply_stops(self, parts: list[Part]) -> list[Part]:
        """Cut the answer's text at the first stop string and drop empty parts."""
        kept = []
        for reasoning, text in parts:
            if not reasoning:
                text, self.stopped = self._stops.push(text)
            if text:
                kept.append((reasoning, text))
        return kept


class StopStrings:
    """Ends the text at the first stop string, even one split across pieces; holds back what may be the start of one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Return (text that is safe to emit now, whether a stop string was found)."""
        if self._stopped:
            return "", True
        text = self._pending + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:  # take the stop string that ends first, so that the result does not depend on the pieces
            self._pending, self._stopped = "", True
            return text[: min(ends)[1]], True
        pending = max((partial_match_length(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - pending :]
        return text[: len(text) - pending], False

    def flush(self) -> str:
        """Return the text held back, at the end of the answer."""
        text, self._pending = self._pending, ""
        return text
