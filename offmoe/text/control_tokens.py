"""Tokens that structure a prompt, and text that must never become one of them.

Roles' marks, ends of turns and reasoning marks come from the chat template alone. What a person, a document or a model
wrote is data: the characters `<|im_end|>` in it are encoded as the ordinary text that they are.
"""

from __future__ import annotations

import json
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer

# Tags that Gemma's vocabulary has as visible tokens. A page of HTML is ordinary text.
HTML = (
    "table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|p|br|div|span|ul|ol|li"
)
ORDINARY = re.compile(rf"[^<>\[\]{{}}|｜]+|</?({HTML})>")  # visible tokens that are spaces, words, or HTML


@dataclass(frozen=True)
class Span:
    """Part of a prompt: the template's own text, or data."""

    text: str
    is_data: bool


class ControlTokens:
    """The added tokens with a meaning in prompts: hidden ones, ends of turns, and visible marks such as <think>.

    Visible tokens that are spaces, words or HTML are ordinary text, in data too.
    """

    def __init__(self, library: Tokenizer, ends: Iterable[int]) -> None:
        added, ends = library.get_added_tokens_decoder(), set(ends)
        self._library = library
        self._tokens = {
            id: token
            for id, token in added.items()
            if token.content and (token.special or id in ends or not ORDINARY.fullmatch(token.content))
        }
        self._ids = {token.content: id for id, token in self._tokens.items()}
        self._pattern = re.compile(alternatives(self._ids) if self._ids else "(?!)")
        self._names = {text: f"{secrets.randbelow(10**20):020}" for text in self._ids}  # in the twin

    def replace(self, text: str, name: Callable[[str], str]) -> str:
        """Return `text` with `name(token)` for each control token in it: the longest at each place, from the left."""
        return self._pattern.sub(lambda match: name(match[0]), text)

    def __contains__(self, id: int) -> bool:
        return id in self._tokens

    def encode(self, spans: Sequence[Span]) -> list[int]:
        """Return the ids of the spans' text. Control tokens are recognised outside of data only.

        Without control tokens in the data these are the ids of the whole text, merges across the seams included.
        """
        text = "".join([span.text for span in spans])
        ids = encode(self._library, text)
        if not any(span.is_data and span.text for span in spans):
            return ids
        own = self._own_tokens(spans, text)
        if [id for id in ids if id in self._tokens] == [self._ids[match[0]] for match in own]:
            return ids
        twin, own_ids = self._twin
        starts, ends = [0, *(match.end() for match in own)], [*(match.start() for match in own), len(text)]
        names = [*(self._names[match[0]] for match in own), ""]
        renamed = [text[start:end] + name for start, end, name in zip(starts, ends, names, strict=True)]
        return [own_ids.get(id, id) for id in encode(twin, "".join(renamed))]

    def _own_tokens(self, spans: Sequence[Span], text: str) -> list[re.Match[str]]:
        """Return where control tokens stand in `text` outside of data."""
        found: list[re.Match[str]] = []
        at = 0
        for is_data, group in groupby(filter(lambda span: span.text, spans), key=lambda span: span.is_data):
            end = at + sum(len(span.text) for span in group)
            found += (
                [] if is_data else [match for match in self._pattern.finditer(text, at, end) if self._counts(match)]
            )
            at = end
        return found

    def _counts(self, match: re.Match[str]) -> bool:
        """Return whether the library takes the match for a token: some must not touch letters or digits."""
        if not self._tokens[self._ids[match[0]]].single_word:
            return True
        around = match.string[max(match.start() - 1, 0) : match.start()] + match.string[match.end() : match.end() + 1]
        return not any(char.isalnum() or unicodedata.category(char) in ("Mn", "Mc", "Me", "Pc") for char in around)

    @cached_property
    def _twin(self) -> tuple[Tokenizer, dict[int, int]]:
        """The same tokenizer with control tokens under secret names, so that no data can spell one; and their ids."""
        raw = json.loads(self._library.to_str())
        raw["post_processor"] = None  # names the tokens that it adds
        rename_model(raw["model"], self._names)
        for token in raw["added_tokens"]:
            if token["content"] in self._names:
                token["content"] = self._names[token["content"]]
                token |= {"normalized": False, "single_word": False}
        twin = Tokenizer.from_str(json.dumps(raw))
        added = {token.content: id for id, token in twin.get_added_tokens_decoder().items()}
        return twin, {added[name]: self._ids[text] for text, name in self._names.items()}


def encode(library: Tokenizer, text: str) -> list[int]:
    """Return the ids of `text` without those of a post-processor."""
    (encoding,) = library.encode_batch_fast([text], add_special_tokens=False)  # omits offsets: a third faster
    return list(encoding.ids)


def rename_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens of a tokenizer.json's `model`; merges that would spell them go."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): id for text, id in vocab.items()}
    else:  # Unigram: pieces with scores
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    if pairs:
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]


def alternatives(texts: Iterable[str]) -> str:
    """Return an expression that matches the longest of `texts`, fast even if there are thousands."""
    groups = {first: [text[1:] for text in group] for first, group in groupby(sorted(texts), key=lambda text: text[:1])}
    rest = groups.pop("", None)
    parts = []
    for first, tails in groups.items():
        while len(shared := {tail[:1] for tail in tails}) == 1 and "" not in shared:
            first, tails = first + shared.pop(), [tail[1:] for tail in tails]
        parts.append(re.escape(first) + (alternatives(tails) if tails != [""] else ""))
    if not parts:
        return ""
    inner = parts[0] if len(parts) == 1 and rest is None else f"(?:{'|'.join(parts)})"
    return inner if rest is None else f"{inner}?"
