"""A packed tokenizer gives the same ids as the tokenizer.json that it was made from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import saved
from tokenizers import AddedToken, Tokenizer
from trained_tokenizers import byte_level, normalising, sentencepiece, whole_words

from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError
from offmoe.pack import tokenizer_keys
from offmoe.pack.convert import pack
from offmoe.text.tokenizer import load_tokenizer

TEXTS = [
    "the lazy fox",
    " jumps  over\n\nthe dog",
    "café 日本 \U0001f600 123456",
    "a<|end|>b <|tool|> c",
    "don't",
    "zehn",
    "cafe\u0301 \u1100\u1161",
]


KINDS = {"gpt2": byte_level, "nfc": normalising, "whole": whole_words, "llama": sentencepiece}


def with_tokenizer(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Save a tiny model whose vocabulary is larger than the tokenizer's."""
    tokenizer.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    source = saved("olmoe", folder)
    fields = json.loads((source / "config.json").read_text())
    fields["vocab_size"] = tokenizer.get_vocab_size() + 5
    (source / "config.json").write_text(json.dumps(fields))
    enlarge(source, fields["vocab_size"])
    tokenizer.save(str(source / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    return source


def enlarge(source: Path, vocab: int) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].repeat(vocab // 96 + 1, 1)[:vocab].contiguous()
    save_file(tensors, source / "model.safetensors")


def packed(source: Path, out: Path) -> Path:
    with open_checkpoint(source) as checkpoint:
        pack(checkpoint, out, "f32", lambda done, total: None)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_template_survive(kind: str, tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path, KINDS[kind](), chat_template="{{ messages[0].content }}", add_bos_token=True)
    with open_checkpoint(source) as before, open_checkpoint(packed(source, tmp_path / "m.gguf")) as after:
        assert after.metadata["tokenizer.ggml.model"] == ("llama" if kind == "llama" else "gpt2")
        tokens, types = (after.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
        assert len(tokens) == len(types) == after.metadata["olmoe.vocab_size"]
        assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
        assert [types[tokens.index(text)] for text in ("<s>", "<|end|>", "<|tool|>", "e", tokens[-1])] == [
            3,
            3,
            4,
            1,
            5,
        ]
        want, got = load_tokenizer(before), load_tokenizer(after)
        assert (got.bos, got.eos, got.chat_template) == (want.bos, want.eos, want.chat_template)
        for text in TEXTS:
            assert got.encode(text) == want.encode(text), text
            assert got.decode(got.encode(text)) == want.decode(want.encode(text)), text
        want.close()
        got.close()


def same_ids(source: Path, out: Path, texts: list[str]) -> None:
    """Compare the directory's and the packed tokenizer, raw texts and conversations."""
    with open_checkpoint(source) as before, open_checkpoint(packed(source, out)) as after:
        want, got = load_tokenizer(before), load_tokenizer(after)
        for text in texts:
            assert got.encode(text) == want.encode(text), text
            for messages in ([{"role": "user", "content": text}], [{"role": "user", "content": f"\n {text} x"}]):
                assert got.encode_chat(messages) == want.encode_chat(messages), text  # type: ignore[arg-type]
        assert (got.bos, got.eos) == (want.bos, want.eos)
        want.close()
        got.close()


FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
TEMPLATE = "{{ bos_token }}<|a|> {{ messages[0].content }} <|b|>\n<|c|>{{ messages[0].content }}<|a|><|b|>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_added_tokens_survive(kind: str, flag: str, tmp_path: Path) -> None:
    """Tokens with a flag, hidden and visible ones, in tokenizer.json; they take the same spaces after packing."""
    library = KINDS[kind]()
    tokens = [AddedToken("<|a|>", special=True, **{"normalized": False, flag: True})]
    tokens += [AddedToken("<|b|>", **{"normalized": False, flag: True}), AddedToken("<|c|>", normalized=False)]
    library.add_tokens(tokens)
    source = with_tokenizer(tmp_path, library, chat_template=TEMPLATE)
    texts = ["fox <|a|> \n dog", "x<|b|>y <|b|> z\t<|c|>\n", "<|a|>  <|b|>", "e\u0301<|a|>e\u0301", "_<|a|>_"]
    same_ids(source, tmp_path / "m.gguf", texts)


def test_tokens_of_other_files_survive(tmp_path: Path) -> None:
    entry = {"content": "<|x|>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    library = byte_level()
    first = library.get_vocab_size() + 1  # after <|tool|>
    more = {str(first): {**entry, "special": True}, str(first + 1): {**entry, "content": "<y>", "special": False}}
    source = with_tokenizer(tmp_path, library, chat_template=TEMPLATE, added_tokens_decoder=more, eos_token="<|x|>")
    same_ids(source, tmp_path / "m.gguf", ["a<|x|> \n b<y> c", "<|x|><y>"])


@pytest.mark.parametrize("ends", [[5], [5, 6], [2, 5, 6], [6, 5], 9])
def test_ends_of_answers_survive(ends: Any, tmp_path: Path) -> None:
    """Those that only generation_config.json names, too."""
    named = {"eos_token": None} if ends == [6, 5] else {}
    source = with_tokenizer(tmp_path, byte_level(), chat_template=TEMPLATE, **named)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    same_ids(source, tmp_path / "m.gguf", ["x"])


def test_what_a_gguf_would_encode_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are compared before anything is written, whatever the reason of a difference."""
    library = byte_level()
    library.add_tokens([AddedToken("<|b|>", normalized=False, rstrip=True)])
    source = with_tokenizer(tmp_path, library)
    monkeypatch.setattr(tokenizer_keys, "token_flags", lambda *_: {})
    with pytest.raises(OffmoeError, match=r"a GGUF would give the text 'a <\|b\|> b' other token ids"):
        packed(source, tmp_path / "m.gguf")
    monkeypatch.undo()
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6, 7, 8]}))
    with pytest.raises(OffmoeError, match=r"answers end at the tokens .*5, 6, 7, 8"):
        packed(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_tokenizers_that_a_gguf_cannot_say(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path, byte_level())
    raw = json.loads((source / "tokenizer.json").read_text())
    cases = {
        "is not a BPE": {**raw, "model": {"type": "WordPiece", "vocab": {}, "unk_token": "x"}},
        r"normalises text by \['Lowercase', 'NFC'\]": {
            **raw,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "NFC"}]},
        },
        "splits text by": {**raw, "pre_tokenizer": {"type": "Whitespace"}},
        "token id 99999: expected ids below vocab_size": {
            **raw,
            "model": {**raw["model"], "vocab": {**raw["model"]["vocab"], "far": 99999}},
        },
    }
    for message, value in cases.items():
        (source / "tokenizer.json").write_text(json.dumps(value))
        with pytest.raises(OffmoeError, match=message):
            packed(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.llama
@pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="needs llama-cpp-python")
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_finds_the_same_ids(kind: str, tmp_path: Path) -> None:
    import llama_cpp

    source = with_tokenizer(tmp_path, KINDS[kind](), add_bos_token=False)
    out = packed(source, tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(out), vocab_only=True, verbose=False)
    with open_checkpoint(source) as checkpoint:
        want = load_tokenizer(checkpoint)
        for text in TEXTS[: {"nfc": -1, "whole": -2}.get(kind)]:  # it does not normalise, and merges
            assert llama.tokenize(text.encode(), add_bos=False, special=True) == want.encode(text), text
        want.close()
