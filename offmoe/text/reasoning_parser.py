"""Reasoning told from the answer while both come: a block between two marks, or harmony's channels.

A mark that is a token of its own is written as a lone surrogate, which decoded text never holds: a model that merely
spells it out, in a text about itself, is not taken at its word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

Part = tuple[bool, str]  # whether it is reasoning; its text
# What families put around reasoning. The last is the commonest, and assumed where nothing is known.
PAIRS = (
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
LONGEST_HEADER = 256  # characters; what is longer is no header


@dataclass(frozen=True)
class Format:
    """How one model marks reasoning."""

    open: str
    close: str
    harmony: bool
    tokens: Mapping[str, str]  # surrogate: the token that it stands for
    marks: Mapping[int, str]  # the same by the token's id
    shown: Mapping[str, str]  # surrogate: what a person sees of a mark out of place

    def splitter(self, prompt: str) -> Splitter:
        """For the answer to a prompt, of which the last tokens are given, marks as surrogates."""
        if self.harmony:
            return Channels(self.shown, prompt)
        open, close = self._marked(self.open), self._marked(self.close)
        return Block(self.shown, open, close, inside=prompt.rstrip().endswith(open))

    def whole(self, reasoning: str, answer: str) -> str:
        """Both as the model wrote them, for a template that takes no reasoning apart from the content."""
        return f"{self.open}\n{reasoning}\n{self.close}\n\n{answer}"

    def _marked(self, text: str) -> str:
        for mark, token in self.tokens.items():
            text = text.replace(token, mark)
        return text


def find_format(template: str, added: Mapping[str, int], special: Collection[str]) -> Format:
    """From what the chat template writes, else from the tokens there are. added: ids by text; special: hidden ones."""
    harmony = {"<|channel|>", "<|message|>"} <= added.keys()
    known = [pair for pair in PAIRS if pair[0] in template and pair[1] in template]
    known += [pair for pair in PAIRS if pair[0] in added and pair[1] in added]
    open, close = (known or PAIRS[-1:])[0]
    single = [token for token in added if TOKEN.fullmatch(token) and token in open + close]
    single = list(HARMONY_TOKENS) if harmony else sorted(single, key=len, reverse=True)
    tokens = {chr(0xD800 + i): token for i, token in enumerate(single)}
    return Format(
        open,
        close,
        harmony,
        tokens,
        {added[token]: mark for mark, token in tokens.items() if token in added},
        {mark: "" if token in special else token for mark, token in tokens.items()},
    )


class Splitter:
    """Text in, parts out; marks and the empty lines around them are left out."""

    def __init__(self, shown: Mapping[str, str]) -> None:
        self.inside = False  # a block of reasoning is open
        self.plain = True  # no mark has come: all is answer, letter by letter
        self._shown = str.maketrans(dict(shown))
        self._held = ""  # what may be the beginning of a mark
        self._space = ""  # the end of the reasoning so far: shown if more comes
        self._said = self._thought = False  # something was shown

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        """What was held back, when no more comes."""
        parts: list[Part] = []
        text, self._held = self._held, ""
        self._emit(parts, text)
        return parts

    def _step(self, parts: list[Part]) -> bool:
        """Take from `_held` what is clear; True: look again."""
        raise NotImplementedError

    def _emit(self, parts: list[Part], text: str) -> None:
        text = text.translate(self._shown)
        if self.inside:
            text = self._space + text if self._thought else text.lstrip()
            self._space = text[len(text.rstrip()) :]
            text = text.rstrip()
            self._thought |= bool(text)
        elif not self.plain and not self._said:
            text = text.lstrip("\r\n")
        self._said |= bool(text) and not self.inside
        if text:
            parts.append((self.inside, text))


class Block(Splitter):
    """One block at the beginning: between `open`, which the prompt may have written, and `close`."""

    def __init__(self, shown: Mapping[str, str], open: str, close: str, inside: bool) -> None:
        super().__init__(shown)
        self._open, self._close = open, close
        self.inside, self.plain = inside, not inside
        self._before = not inside

    def _step(self, parts: list[Part]) -> bool:
        if self._before:
            return self._begin()
        if self.inside:
            return self._look_for_end(parts)
        text, self._held = self._held, ""
        self._emit(parts, text)
        return False

    def _begin(self) -> bool:
        text = self._held.lstrip()
        for mark in (self._open, self._close):  # some models close what they never opened
            if text.startswith(mark):
                self._held = text[len(mark) :]
                self._before = self.plain = False
                self.inside = mark == self._open
                return True
        self._before = self._open.startswith(text) or self._close.startswith(text)
        return not self._before

    def _look_for_end(self, parts: list[Part]) -> bool:
        before, mark, after = self._held.partition(self._close)
        if not mark:
            keep = possible_start(before, self._close)
            before, after = before[: len(before) - keep], before[len(before) - keep :]
        self._held = after
        self._emit(parts, before)
        self.inside = not mark
        return bool(mark)


class Channels(Splitter):
    """OpenAI's harmony: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…

    All but calls of tools (`to=`) and the channel analysis is for the reader.
    """

    def __init__(self, shown: Mapping[str, str], prompt: str) -> None:
        super().__init__(dict.fromkeys(shown, ""))
        tail = prompt[prompt.rfind(START) + 1 :]
        self._in_header = START in prompt and MESSAGE not in tail
        self.plain = not self._in_header
        if MESSAGE in tail:
            self.inside = is_analysis(tail[: tail.index(MESSAGE)])

    def _step(self, parts: list[Part]) -> bool:
        return self._header() if self._in_header else self._body(parts)

    def _header(self) -> bool:
        header, mark, after = self._held.partition(MESSAGE)
        if mark:
            self.inside = is_analysis(header)
            again = self._thought if self.inside else self._said
            self._held = "\n\n" + after if again else after
            self._in_header, self._space = False, ""
        elif len(header) > LONGEST_HEADER:
            self._in_header = self.inside = False
        return not self._in_header

    def _body(self, parts: list[Part]) -> bool:
        ends = [at for mark in (START, CHANNEL, END) if (at := self._held.find(mark)) >= 0]
        end = min(ends, default=len(self._held))
        text, self._held = self._held[:end], self._held[end:]
        self._emit(parts, text)
        if ends:
            self._in_header, self.plain = True, False
        return bool(ends)

    def flush(self) -> list[Part]:
        if self._in_header and any(mark in self._held for mark in HARMONY):
            self._held = ""  # a header that never ended
        return super().flush()


def is_analysis(header: str) -> bool:
    """Whether a message with this header (`<|channel|>analysis`, perhaps ` to=functions.f`) is not for the reader."""
    channel = header.partition(CHANNEL)[2].split(" ")[0].strip()
    return channel == "analysis" or " to=" in header


def possible_start(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    longest = min(len(mark) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)
