"""Tokenizers of each kind, trained on two sentences."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = ["the quick brown fox jumps over the lazy dog 123 times", "naïve café über, don't they're"] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def normalising() -> Tokenizer:
    """A tokenizer like Qwen's."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def whole_words() -> Tokenizer:
    """A tokenizer like gpt-oss's: a word of the vocabulary is one token, regardless of the merges."""
    raw = json.loads(byte_level().to_str())
    raw["model"]["ignore_merges"] = True
    raw["model"]["vocab"]["zehn"] = len(raw["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(raw))


def sentencepiece() -> Tokenizer:
    """A tokenizer like Mixtral's: special tokens, bytes, then merged tokens."""
    words = Tokenizer(models.BPE())
    words.normalizer = normalizers.Replace(" ", "▁")
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    learnt = json.loads(words.to_str())["model"]
    texts = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += sorted(learnt["vocab"], key=learnt["vocab"].get)
    merges = [tuple(merge) for merge in learnt["merges"]]
    vocab = {text: id for id, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def words(library: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges."""
    model = json.loads(library.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
