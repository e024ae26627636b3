"""Vocabulary of a GGUF file, from its `tokenizer.ggml.*` metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from offmoe.errors import OffmoeError
from offmoe.text.gguf_metadata import BYTE, CONTROL, UNKNOWN, USER_DEFINED, GgufVocab, read_gguf_tokens
from offmoe.text.pretokenizers import build_pre_tokenizer
from offmoe.text.template_files import gguf_template
from offmoe.text.vocab import NAMES, Vocab, converting_errors, end_of_turn_ids


def vocab_from_gguf(metadata: Mapping[str, Any]) -> Vocab:
    """Read a BPE vocabulary with merges ("gpt2", "gemma4") or with sentencepiece scores ("llama").

    Keys that the file leaves out have the values that llama.cpp's loader gives them, with a note where it guesses.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "no_vocab", "none"):
        raise OffmoeError("the file has no tokenizer (no vocabulary in it): use a GGUF that has one, or pass token ids")
    if model not in ("gpt2", "gemma4", "llama"):
        raise OffmoeError(
            f"the file's tokenizer model {str(model)[:40]!r} is not supported: expected gpt2, gemma4, llama"
        )
    vocab = read_gguf_tokens(metadata)
    sentencepiece = model == "llama"
    with converting_errors("the file's tokenizer is damaged"):
        tokenizer = sentencepiece_bpe(vocab) if sentencepiece else bpe_with_merges(vocab)
    return build_vocab(vocab, tokenizer, sentencepiece)


def build_vocab(vocab: GgufVocab, tokenizer: Tokenizer, sentencepiece: bool) -> Vocab:
    """Add the special ids and the template to the tokenizer; defaults follow llama.cpp for each kind."""
    bos = vocab.id("bos", 1 if sentencepiece else None)
    eos = vocab.id("eos", 2 if sentencepiece else None)
    ends = end_of_turn_ids(vocab.ids(), (id for id in (eos, vocab.id("eot"), vocab.id("eom")) if id is not None))
    mark_special(tokenizer, vocab, ends)
    ids = {key: vocab.id(key) for key in NAMES} | {"bos": bos, "eos": eos}
    if ids["seperator"] is None:
        ids["seperator"] = vocab.id("separator")
    template, notes = gguf_template(vocab.metadata)
    return Vocab(
        tokenizer,
        {NAMES[name]: vocab.tokens[id] for name, id in ids.items() if id is not None},
        bos,
        ends,
        bos is not None and vocab.adds_bos(),
        template,
        (*vocab.notes(), *notes),
    )


def mark_special(tokenizer: Tokenizer, vocab: GgufVocab, ends: frozenset[int]) -> None:
    """Add the tokens that are matched in text before it is split: control tokens are hidden, user-defined ones
    visible.
    """
    flagged, added = vocab.flags(), []
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
    if not isinstance(scores, list) or len(scores) < len(vocab.tokens):
        raise OffmoeError(f"tokenizer.ggml.scores does not match the {len(vocab.tokens)} tokens: the file is damaged")
    parts = {text for text, kind in zip(vocab.tokens, vocab.types, strict=True) if kind not in (CONTROL, BYTE, UNKNOWN)}
    merges = [
        (score, text[:cut], text[cut:])
        for text, score in zip(vocab.tokens, scores, strict=False)
        if text in parts
        for cut in range(1, len(text))
        if text[:cut] in parts and text[cut:] in parts
    ]
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]
