"""Vocabulary of a GGUF file, from its `tokenizer.ggml.*` metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from offmoe.errors import OffmoeError
from offmoe.text.pretokenizers import PreTokenizerKind, build_pre_tokenizer, find_kind
from offmoe.text.template_files import gguf_template
from offmoe.text.vocab import END_OF_TURN, NAMES, Vocab, converting_errors, end_of_turn_ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
TOKEN_FLAGS = (
    "lstrip",
    "rstrip",
    "single_word",
    "normalized",
)  # added_tokens.<flag>: ids, keys that `offmoe pack` writes

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
        if self.get("add_bos_token") and self.get("model") != "llama" and self.id("bos") is None:
            notes.append(UNNAMED_BOS)
        return notes

    def id(self, name: str, default: int | None = None) -> int | None:
        """Return `tokenizer.ggml.<name>_token_id`, or None if it is outside the vocabulary."""
        value = self.get(f"{name}_token_id", default)
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

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


def vocab_from_gguf(metadata: Mapping[str, Any]) -> Vocab:
    """Read a BPE vocabulary with merges ("gpt2", "gemma4") or with sentencepiece scores ("llama").

    Keys that the file leaves out have the values that llama.cpp's loader gives them, with a note where it guesses.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "no_vocab", "none"):
        raise OffmoeError("the file has no tokenizer (no vocabulary in it): use a GGUF that has one, or pass token ids")
    if model not in ("gpt2", "gemma4", "llama"):
        raise OffmoeError(f"the file's tokenizer model {model!r} is not supported: expected gpt2, gemma4 or llama")
    vocab = read_gguf_tokens(metadata)
    sentencepiece = model == "llama"
    with converting_errors("the file's tokenizer is damaged"):
        tokenizer = sentencepiece_bpe(vocab) if sentencepiece else bpe_with_merges(vocab)
    return build_vocab(vocab, tokenizer, sentencepiece)


def read_gguf_tokens(metadata: Mapping[str, Any]) -> GgufVocab:
    """Read the token list and the types. Raises OffmoeError if their lengths differ or a token appears twice."""
    tokens = GgufVocab(metadata, [], []).strings("tokens")
    tokens = [text or f"[EMPTY_{id}]" for id, text in enumerate(tokens)]  # named as in llama.cpp
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = guessed_types(GgufVocab(metadata, tokens, []))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise OffmoeError(f"tokenizer.ggml.token_type does not match the {len(tokens)} tokens: the file is damaged")
    if len(set(tokens)) != len(tokens):
        raise OffmoeError("tokenizer.ggml.tokens has the same token twice: the file is damaged")
    return GgufVocab(metadata, tokens, types)


def guessed_types(vocab: GgufVocab) -> list[int]:
    """Return types for a file without them: bytes and unknown by text, named tokens and `<|…|>` as control tokens."""
    named = {vocab.id(key) for key in (*NAMES, "eot", "eom")} - {None}
    types = []
    for id, text in enumerate(vocab.tokens):
        control = id in named or text in END_OF_TURN or re.fullmatch(r"<\|.+\|>|<s>|</s>", text)
        kind = CONTROL if control else BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL
        types.append(UNKNOWN if text == "<unk>" else kind)
    return types


def build_vocab(vocab: GgufVocab, tokenizer: Tokenizer, sentencepiece: bool) -> Vocab:
    """Add the special ids and the template to the tokenizer; defaults follow llama.cpp for each kind."""
    bos = vocab.id("bos", 1 if sentencepiece else None)
    eos = vocab.id("eos", 2 if sentencepiece else None)
    ends = end_of_turn_ids(vocab.ids(), (id for id in (eos, vocab.id("eot"), vocab.id("eom")) if id is not None))
    mark_special(tokenizer, vocab, ends)
    ids = {key: vocab.id(key) for key in NAMES} | {"bos": bos, "eos": eos}
    if ids["seperator"] is None:
        ids["seperator"] = vocab.id("separator")
    add_bos = vocab.get("add_bos_token")
    template, notes = gguf_template(vocab.metadata)
    return Vocab(
        tokenizer,
        {NAMES[name]: vocab.tokens[id] for name, id in ids.items() if id is not None},
        bos,
        ends,
        bos is not None and bool((sentencepiece or vocab.kind().add_bos) if add_bos is None else add_bos),
        template,
        (*vocab.notes(), *notes),
    )


def mark_special(tokenizer: Tokenizer, vocab: GgufVocab, ends: frozenset[int]) -> None:
    """Add the tokens that are matched in text before it is split: control tokens are hidden, user-defined ones
    visible.
    """
    flagged = {flag: vocab.ids_under(f"added_tokens.{flag}") for flag in TOKEN_FLAGS}
    added = []
    for id, (text, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) or id in ends:
            flags = {flag: id in ids for flag, ids in flagged.items()}
            added.append(AddedToken(text, special=kind != USER_DEFINED or id in ends, **flags))
    tokenizer.add_tokens(added)


def bpe_with_merges(vocab: GgufVocab) -> Tokenizer:
    """Return a BPE over GPT-2's byte characters or over Unicode characters. GGUF stores a merge as `left right`."""
    kind = vocab.kind()
    ids, merges = vocab.ids(), []
    for merge in vocab.strings("merges"):
        space = merge.find(" ", 1)  # a token may begin with a space
        left, right = merge[:space], merge[space + 1 :]
        if not (left in ids and right in ids and left + right in ids):
            raise OffmoeError(f"the merge {merge!r} contains an unknown token: the file's tokenizer is damaged")
        merges.append((left, right))
    if kind.byte_level:
        ignore = bool(vocab.get("ignore_merges", kind.ignore_merges))
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=ignore))
        tokenizer.decoder = decoders.ByteLevel()
        if vocab.get("normalizer") == "nfc":  # a key that `offmoe pack` writes, as ignore_merges
            tokenizer.normalizer = normalizers.NFC()
    else:
        tokenizer = character_bpe(vocab, merges, bool(vocab.get("add_space_prefix", False)))
    tokenizer.pre_tokenizer = build_pre_tokenizer(kind)
    return tokenizer


def sentencepiece_bpe(vocab: GgufVocab) -> Tokenizer:
    """Return a BPE whose merges follow from the tokens' scores."""
    return character_bpe(vocab, merges_from_scores(vocab), bool(vocab.get("add_space_prefix", True)))


def character_bpe(vocab: GgufVocab, merges: list[tuple[str, str]], add_prefix: bool) -> Tokenizer:
    """Return a BPE with `▁` for spaces and byte tokens for characters that are not in the vocabulary.

    `add_prefix`: put a space before each text.
    """
    unknown = vocab.id("unknown", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab.ids(),
            merges=merges,
            unk_token=None if unknown is None else vocab.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begin = [normalizers.Prepend("▁")] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(vocab: GgufVocab) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes a third one, by descending score of the merged token."""
    scores = vocab.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocab.tokens):
        raise OffmoeError(f"tokenizer.ggml.scores does not match the {len(vocab.tokens)} tokens: the file is damaged")
    parts = {text for text, kind in zip(vocab.tokens, vocab.types, strict=True) if kind not in (CONTROL, BYTE, UNKNOWN)}
    merges = [
        (score, text[:cut], text[cut:])
        for text, score in zip(vocab.tokens, scores, strict=True)
        if text in parts
        for cut in range(1, len(text))
        if text[:cut] in parts and text[cut:] in parts
    ]
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]
