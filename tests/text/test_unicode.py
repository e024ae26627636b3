"""Ten thousand random texts, through each kind of tokenizer, give the same ids as transformers and round-trip."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import Files, load
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers
from trained_tokenizers import CORPUS, byte_level, sentencepiece, words
from unicode_texts import texts

from offmoe.text.tokenizer import Tokenizer


def gguf(library: Library, model: str, **more: Any) -> Tokenizer:
    """Return the same tokenizer from GGUF metadata."""
    vocab, merges = words(library)
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [3 if text in ("<s>", "</s>") else 2 if text == "<unk>" else 1 for text in tokens]
    types = [6 if text.startswith("<0x") else kind for text, kind in zip(tokens, types, strict=True)]
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
    keys = {
        "model": model, "tokens": tokens, "token_type": types, "merges": [" ".join(merge) for merge in merges],
        "scores": [-float(ranks.get(text, 10**6)) for text in tokens], "bos_token_id": vocab["<s>"],
        "eos_token_id": vocab["</s>"], "unknown_token_id": vocab["<unk>"], **more,
    }  # fmt: skip
    files = Files()
    files.metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return load(files)


def unigram() -> Library:
    tokenizer = Library(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted({letter for text in texts()[:3000] for letter in text})
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=len(alphabet) + 200, special_tokens=special, initial_alphabet=alphabet, show_progress=False,
        unk_token="<unk>",
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def directory(library: Library, folder: Path) -> Tokenizer:
    library.save(str(folder / "tokenizer.json"))
    return load(Files(folder))


def theirs(kind: str, library: Library) -> Any:
    """Return transformers' tokenizer, built from vocabulary and merges alone, or from the whole file."""
    import transformers

    if kind in ("PreTrainedTokenizerFast", "Unigram"):
        return transformers.PreTrainedTokenizerFast(tokenizer_object=library)
    vocab, merges = words(library)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return getattr(transformers, kind)(vocab=vocab, merges=merges, **named)


CASES: dict[str, tuple[Callable[[], Library], Callable[[Library, Path], Tokenizer]]] = {
    "GPT2Tokenizer": (byte_level, lambda library, _: gguf(library, "gpt2", pre="gpt-2")),
    "Qwen2Tokenizer": (byte_level, lambda library, _: gguf(library, "gpt2", pre="qwen2")),
    "LlamaTokenizer": (sentencepiece, lambda library, _: gguf(library, "llama")),
    "GemmaTokenizer": (sentencepiece, lambda library, _: gguf(library, "gemma4")),
    "PreTrainedTokenizerFast": (byte_level, directory),
    "Unigram": (unigram, directory),
}


@pytest.mark.parametrize("kind", CASES)
def test_ids_are_those_of_transformers_and_texts_come_back(kind: str, tmp_path: Path) -> None:
    make, open = CASES[kind]
    library = make()
    ours, other = open(library, tmp_path), theirs(kind, library)
    said = texts()
    if kind == "Qwen2Tokenizer":  # it normalises first, which a GGUF cannot express
        said = [unicodedata.normalize("NFC", text) for text in said]
    if kind == "LlamaTokenizer":  # it puts no space before a space, as sentencepiece does
        said = [text.lstrip(" ") for text in said]
    expected = other(said, add_special_tokens=False)["input_ids"]
    back = other.batch_decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = 0
    for text, ids, decoded in zip(said, expected, back, strict=True):
        assert ours._encode(text) == ids, ascii(text)
        assert ours.decode(ids) == decoded, ascii(text)
        whole += decoded == text
    assert whole == len(said) or (kind == "Unigram" and whole > 3000)  # which lacks letters, and has no bytes for them
    ours.close()
