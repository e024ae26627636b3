"""Metadata `tokenizer.ggml.*` of a GGUF, with the defaults of llama.cpp's loader (src/llama-vocab.cpp)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offmoe.errors import OffmoeError
from offmoe.text.pretokenizers import PreTokenizerKind, find_kind
from offmoe.text.vocab import END_OF_TURN, NAMES

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
FLAGS_KEY = "added_tokens"  # keys of our own, which `offmoe pack` writes: ids under added_tokens.<flag>

UNNAMED_CUT = (
    "the file does not say how its tokenizer cuts text (tokenizer.ggml.pre): llama.cpp's default is used, and token "
    "ids may differ from the model's own: prefer a newer file"
)
UNTYPED = (
    "the file does not say which tokens are control tokens (tokenizer.ggml.token_type): those of the form <|…|> are "
    "taken for them"
)

UNNAMED_BOS = (
    "the file says that texts begin with a token that it does not name (tokenizer.ggml.bos_token_id): they do not"
)


@dataclass(frozen=True)
class GgufVocab:
    """Metadata `tokenizer.ggml.*`, validated: one type for each token, and no duplicate tokens."""

    metadata: Mapping[str, Any]
    tokens: list[str]
    types: list[int]

    def ids(self) -> dict[str, int]:
        return {text: id for id, text in enumerate(self.tokens)}

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def kind(self) -> PreTokenizerKind:
        """Return the pre-tokenizer's kind; the tokenizer model gemma4 has one of its own."""
        return find_kind("gemma4" if self.get("model") == "gemma4" else self.get("pre", "default"))

    def notes(self) -> list[str]:
        """Return a note for each key that the file should have and whose value is guessed."""
        notes = []
        if self.get("model") == "gpt2" and self.get("pre") is None:
            notes.append(UNNAMED_CUT)
        if self.get("token_type") is None:
            notes.append(UNTYPED)
        if self.adds_bos() and self.id("bos", 1 if self.get("model") == "llama" else None) is None:
            notes.append(UNNAMED_BOS)
        return notes

    def id(self, name: str, default: int | None = None) -> int | None:
        """Return `tokenizer.ggml.<name>_token_id`, or `default` if it is missing or outside the vocabulary, or None."""
        found = (value for value in (self.get(f"{name}_token_id"), default) if isinstance(value, int))
        return next((id for id in found if 0 <= id < len(self.tokens)), None)

    def adds_bos(self) -> bool:
        """Return whether texts begin with bos, if there is one."""
        if self.get("model") == "gemma4":
            return True  # whatever the file says, as in llama.cpp: published files say no
        stated = self.get("add_bos_token")
        return bool(self.get("model") == "llama" or self.kind().add_bos if stated is None else stated)

    def flags(self) -> dict[str, set[int]]:
        """Return the ids of added tokens by flag, from the keys that `offmoe pack` writes.

        Files of others hold no flags. Of Phi-3's control tokens llama.cpp knows that they take the spaces after them.
        """
        flagged = {flag: self.ids_under(f"{FLAGS_KEY}.{flag}") for flag in TOKEN_FLAGS}
        name, arch = (str(self.metadata.get(f"general.{key}", "")).lower() for key in ("name", "architecture"))
        phi = "phi-3" in name or "phi3" in name or arch == "phimoe"
        if phi and not self.get(f"{FLAGS_KEY}.complete"):
            flagged["rstrip"] |= {
                id
                for id, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
                if kind in (CONTROL, USER_DEFINED) and text not in ("<unk>", "<s>", "<|endoftext|>")
            }
        return flagged

    def ids_under(self, key: str) -> set[int]:
        """Return a list of ids; empty if the key is missing."""
        values = self.get(key)
        return {id for id in values if isinstance(id, int)} if isinstance(values, list) else set()

    def strings(self, key: str) -> list[str]:
        """Return a list of strings. Raises OffmoeError if the key is missing or holds anything else."""
        values = self.get(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise OffmoeError(
                f"tokenizer.ggml.{key} is missing or not a list of strings: the file has no usable tokenizer"
            )
        return values


def read_gguf_tokens(metadata: Mapping[str, Any]) -> GgufVocab:
    """Read the token list and the types. Raises OffmoeError if their lengths differ or a token appears twice."""
    tokens = GgufVocab(metadata, [], []).strings("tokens")
    tokens = [text or f"[EMPTY_{id}]" for id, text in enumerate(tokens)]  # named as in llama.cpp
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = guessed_types(GgufVocab(metadata, tokens, []))
    if not isinstance(types, list) or len(types) < len(tokens):
        raise OffmoeError(f"tokenizer.ggml.token_type does not match the {len(tokens)} tokens: the file is damaged")
    if len(set(tokens)) != len(tokens):
        raise OffmoeError("tokenizer.ggml.tokens has the same token twice: the file is damaged")
    return GgufVocab(metadata, tokens, types[: len(tokens)])


def guessed_types(vocab: GgufVocab) -> list[int]:
    """Return types for a file without them: bytes and unknown by text, named tokens and `<|…|>` as control tokens."""
    named = {vocab.id(key) for key in (*NAMES, "eot", "eom")} - {None}
    types = []
    for id, text in enumerate(vocab.tokens):
        control = id in named or text in END_OF_TURN or re.fullmatch(r"<\|.+\|>|<s>|</s>", text)
        kind = CONTROL if control else BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL
        types.append(UNKNOWN if text == "<unk>" else kind)
    return types
