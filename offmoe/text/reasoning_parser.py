"""Separate reasoning from the answer while both are generated: a block between two markers, or harmony's channels.

A marker that is a token of its own is represented by a lone surrogate, which decoded text never contains. So a model
that merely spells out the marker in its text does not start or end reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

Part = tuple[bool, str]  # (whether it is reasoning, text)
# Markers that model families put around reasoning. The last pair is the most common and the default.
MARKER_PAIRS = (
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|think|>", "<|end|><|begin|>assistant<|content|>"),
    ("[THINK]", "[/THINK]"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    ("<think>", "</think>"),
)
HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
HARMONY = CHANNEL, MESSAGE, START, END = ("\ud800", "\ud801", "\ud802", "\ud803")
TOKEN = re.compile(r"[<\[].+[>\]]")
LONGEST_HEADER = 256  # characters; longer text is not a header


@dataclass(frozen=True)
class ReasoningFormat:
    """Markers of one model's reasoning."""

    open: str
    close: str
    harmony: bool
    tokens: Mapping[str, str]  # surrogate → text of the token that it stands for
    markers: Mapping[int, str]  # token id → surrogate
    visible: Mapping[str, str]  # surrogate → text displayed for a misplaced marker

    def parser(self, prompt: str) -> ReasoningParser:
        """Return a parser of the answer to `prompt`, the text of the prompt's last tokens: markers as surrogates, other
        hidden tokens as NUL.
        """
        if self.harmony:
            return HarmonyParser(self.visible, prompt)
        open, close = self._with_surrogates(self.open), self._with_surrogates(self.close)
        begun = prompt.rpartition("\0")[2] if open in self.tokens else ""  # what a message says cannot spell the token
        in_reasoning = prompt.rstrip().endswith(open) or begun.rfind(open) > begun.rfind(close)
        return BlockParser(self.visible, open, close, in_reasoning)

    @property
    def frame(self) -> tuple[str, str]:
        """Text before reasoning, and between it and the answer, as models write it."""
        return f"{self.open}\n", f"\n{self.close}\n\n"

    def _with_surrogates(self, text: str) -> str:
        """Return `text` with each marker token replaced by its surrogate."""
        for marker, token in self.tokens.items():
            text = text.replace(token, marker)
        return text


def detect_format(template: str, added: Mapping[str, int], special: Collection[str]) -> ReasoningFormat:
    """Find the reasoning format from the markers in the chat template, else from the added tokens.

    `added` maps the text of added tokens to ids; `special` are the hidden ones.
    """
    harmony = {"<|channel|>", "<|message|>"} <= added.keys()
    known = [pair for pair in MARKER_PAIRS if pair[0] in template and pair[1] in template]
    known += [pair for pair in MARKER_PAIRS if pair[0] in added and pair[1] in added]
    open, close = (known or MARKER_PAIRS[-1:])[0]
    single = [token for token in added if TOKEN.fullmatch(token) and token in open + close]
    single = list(HARMONY_TOKENS) if harmony else sorted(single, key=len, reverse=True)
    tokens = {chr(0xD800 + i): token for i, token in enumerate(single)}
    return ReasoningFormat(
        open,
        close,
        harmony,
        tokens,
        {added[token]: marker for marker, token in tokens.items() if token in added},
        {marker: "" if token in special else token for marker, token in tokens.items()},
    )


class ReasoningParser:
    """Split text into reasoning and answer as it arrives; markers and the empty lines around them are dropped."""

    def __init__(self, visible: Mapping[str, str]) -> None:
        self.in_reasoning = False
        self.saw_no_marker = True  # all text so far is answer, verbatim
        self._visible = str.maketrans(dict(visible))
        self._pending = ""  # text held back because a marker may begin in it
        self._trailing_space = ""  # whitespace at the end of the reasoning, emitted if more reasoning follows
        self._has_answer = self._has_reasoning = False  # whether any was emitted

    def push(self, text: str) -> list[Part]:
        """Add `text` and return the parts that are certain now."""
        self._pending += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        """Return the text held back, at the end of the answer."""
        parts: list[Part] = []
        text, self._pending = self._pending, ""
        self._emit(parts, text)
        return parts

    def _step(self, parts: list[Part]) -> bool:
        """Move what is certain from `_pending` to `parts`; return whether to call again."""
        raise NotImplementedError

    def _emit(self, parts: list[Part], text: str) -> None:
        """Append `text` as a part, without the whitespace next to markers."""
        text = text.translate(self._visible)
        if self.in_reasoning:
            text = self._trailing_space + text if self._has_reasoning else text.lstrip()
            self._trailing_space = text[len(text.rstrip()) :]
            text = text.rstrip()
            self._has_reasoning |= bool(text)
        elif not self.saw_no_marker and not self._has_answer:
            text = text.lstrip("\r\n")
        self._has_answer |= bool(text) and not self.in_reasoning
        if text:
            parts.append((self.in_reasoning, text))


class BlockParser(ReasoningParser):
    """One block at the start, between `open`, which may be the end of the prompt, and `close`."""

    def __init__(self, visible: Mapping[str, str], open: str, close: str, in_reasoning: bool) -> None:
        super().__init__(visible)
        self._open, self._close = open, close
        self.in_reasoning, self.saw_no_marker = in_reasoning, not in_reasoning
        self._at_start = not in_reasoning

    def _step(self, parts: list[Part]) -> bool:
        if self._at_start:
            return self._parse_start()
        if self.in_reasoning:
            return self._parse_reasoning(parts)
        text, self._pending = self._pending, ""
        self._emit(parts, text)
        return False

    def _parse_start(self) -> bool:
        """Look for a marker at the start of the answer."""
        text = self._pending.lstrip()
        for marker in (self._open, self._close):  # some models write `close` without `open`
            if text.startswith(marker):
                self._pending = text[len(marker) :]
                self._at_start = self.saw_no_marker = False
                self.in_reasoning = marker == self._open
                return True
        self._at_start = self._open.startswith(text) or self._close.startswith(text)
        return not self._at_start

    def _parse_reasoning(self, parts: list[Part]) -> bool:
        """Emit reasoning up to `close`, or up to what may be its beginning."""
        before, marker, after = self._pending.partition(self._close)
        if not marker:
            pending = partial_match_length(before, self._close)
            before, after = before[: len(before) - pending], before[len(before) - pending :]
        self._pending = after
        self._emit(parts, before)
        self.in_reasoning = not marker
        return bool(marker)


class HarmonyParser(ReasoningParser):
    """OpenAI's harmony: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…

    Everything is answer, except tool calls (`to=`) and the channel analysis.
    """

    def __init__(self, visible: Mapping[str, str], prompt: str) -> None:
        super().__init__(dict.fromkeys(visible, ""))
        tail = prompt[prompt.rfind(START) + 1 :]
        self._in_header = START in prompt and MESSAGE not in tail
        self.saw_no_marker = not self._in_header
        if MESSAGE in tail:
            self.in_reasoning = is_analysis(tail[: tail.index(MESSAGE)])

    def _step(self, parts: list[Part]) -> bool:
        return self._parse_header() if self._in_header else self._parse_body(parts)

    def _parse_header(self) -> bool:
        """Read a message's header up to <|message|>."""
        header, marker, after = self._pending.partition(MESSAGE)
        if marker:
            self.in_reasoning = is_analysis(header)
            again = self._has_reasoning if self.in_reasoning else self._has_answer
            self._pending = "\n\n" + after if again else after
            self._in_header, self._trailing_space = False, ""
        elif len(header) > LONGEST_HEADER:
            self._in_header = self.in_reasoning = False
        return not self._in_header

    def _parse_body(self, parts: list[Part]) -> bool:
        """Emit a message's text up to the next marker."""
        ends = [at for marker in (START, CHANNEL, END) if (at := self._pending.find(marker)) >= 0]
        end = min(ends, default=len(self._pending))
        text, self._pending = self._pending[:end], self._pending[end:]
        self._emit(parts, text)
        if ends:
            self._in_header, self.saw_no_marker = True, False
        return bool(ends)

    def flush(self) -> list[Part]:
        if self._in_header and any(marker in self._pending for marker in HARMONY):
            self._pending = ""  # an unfinished header
        return super().flush()


def is_analysis(header: str) -> bool:
    """Return whether a message with this header (`<|channel|>analysis`, perhaps ` to=functions.f`) is not for the
    user.
    """
    channel = header.partition(CHANNEL)[2].split(" ")[0].strip()
    return channel == "analysis" or " to=" in header


def partial_match_length(text: str, marker: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `marker`."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)
