"""What a GGUF's vocabulary leaves out means what llama.cpp's loader makes of it, with a note where that is a guess."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tokenizer_files import Files, load
from trained_tokenizers import byte_level, sentencepiece, words

from offmoe.text.gguf_metadata import UNNAMED_BOS, UNNAMED_CUT, UNTYPED
from offmoe.text.tokenizer import ENDLESS, Tokenizer

CHAT = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{{ sep_token }}"
TEXTS = ("the lazy fox <|im_start|> x<|im_end|>", "12345 don't  \n\n", "</s>é日本", "plain")


@pytest.fixture
def gguf() -> Iterator[Callable[..., Tokenizer]]:
    """Makes a tokenizer from metadata: `model` gpt2 or llama, keys of tokenizer.ggml, None for a missing one."""
    opened: list[Tokenizer] = []

    def make(model: str = "gpt2", metadata: dict[str, Any] | None = None, **keys: Any) -> Tokenizer:
        vocab, merges = words(byte_level() if model == "gpt2" else sentencepiece())
        tokens = [*sorted(vocab, key=vocab.__getitem__), "<|im_start|>", "<|im_end|>"]
        types = [{"<unk>": 2, "<s>": 3, "</s>": 3}.get(text, 3 if text[:2] == "<|" else 1) for text in tokens]
        types = [6 if text.startswith("<0x") else kind for text, kind in zip(tokens, types, strict=True)]
        ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
        ggml = {
            "model": model,
            "tokens": tokens,
            "token_type": types,
            "merges": [" ".join(pair) for pair in merges],
            "pre": "gpt-2",
            "scores": [-float(ranks.get(text, 10**6)) for text in tokens],
            **keys,
        }
        files = Files()
        files.metadata = {f"tokenizer.ggml.{key}": value for key, value in ggml.items() if value is not None}
        files.metadata |= {"tokenizer.chat_template": CHAT} if metadata is None else metadata
        opened.append(load(files))
        return opened[-1]

    yield make
    for tokenizer in opened:
        tokenizer.close()


def test_missing_cut_is_the_default_with_a_note(gguf: Callable[..., Tokenizer]) -> None:
    without, default, own = gguf(pre=None, metadata={}), gguf(pre="default", metadata={}), gguf(metadata={})
    assert [without._encode(text) for text in TEXTS] == [default._encode(text) for text in TEXTS]
    assert without._encode("12345") != own._encode("12345") or without._encode("a!!b") == own._encode("a!!b")
    assert (without.notes, default.notes) == ([UNNAMED_CUT], [])
    assert gguf("llama", pre=None, metadata={}).notes == []  # sentencepiece has no such cut


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_missing_types_are_told_from_the_texts(gguf: Callable[..., Tokenizer], model: str) -> None:
    without, full = gguf(model, token_type=None, metadata={}), gguf(model, metadata={})
    for text in TEXTS:
        assert without._encode(text) == full._encode(text)
        assert without.decode(without._encode(text)) == full.decode(full._encode(text))
    assert without.notes == [UNTYPED]


@pytest.mark.parametrize(
    ("model", "keys", "expected"),
    [
        ("llama", {}, True),
        ("llama", {"add_bos_token": False}, False),
        ("gpt2", {}, False),
        ("gpt2", {"pre": None}, False),
        ("gpt2", {"pre": "qwen2"}, False),
        ("gpt2", {"pre": "llama-bpe"}, True),
        ("gpt2", {"pre": "tekken"}, True),
        ("gpt2", {"pre": "llama-bpe", "add_bos_token": False}, False),
        ("gpt2", {"add_bos_token": True}, True),
    ],
)
def test_bos_before_a_text(gguf: Callable[..., Tokenizer], model: str, keys: dict[str, Any], expected: bool) -> None:
    """Default of each kind, as in llama.cpp."""
    tokenizer = gguf(model, bos_token_id=1, **keys)
    assert (tokenizer.encode("x")[0] == 1) is expected


def test_default_ids_of_sentencepiece(gguf: Callable[..., Tokenizer]) -> None:
    tokenizer = gguf("llama")
    assert tokenizer.bos == 1
    assert 2 in tokenizer.eos
    assert gguf().bos is None


def test_missing_ends_and_bos_are_told(gguf: Callable[..., Tokenizer]) -> None:
    tokenizer = gguf(metadata={}, add_bos_token=True)
    tokens = [token.replace("<|", "<!") for token in words(byte_level())[0]]
    without = gguf(metadata={}, tokens=tokens, token_type=[1] * len(tokens), merges=[], scores=None)
    assert UNNAMED_BOS in tokenizer.notes
    assert without.notes == [ENDLESS]


@pytest.mark.parametrize("key", ["eos", "eot", "eom"])
def test_ends_of_answers(gguf: Callable[..., Tokenizer], key: str) -> None:
    tokenizer = gguf(**{f"{key}_token_id": 7})
    assert 7 in tokenizer.eos
    assert tokenizer.token_bytes(7) == b""


@pytest.mark.parametrize("key", ["seperator", "separator"])
def test_named_tokens_in_templates(gguf: Callable[..., Tokenizer], key: str) -> None:
    tokenizer = gguf(bos_token_id=1, **{f"{key}_token_id": 2})
    ids = tokenizer.encode_chat([{"role": "user", "content": "the </s>"}])
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids[1:-1].count(2) == 0
    assert tokenizer.notes == []
    assert any("sep_token" in note for note in gguf(bos_token_id=1).notes)


def test_named_templates(gguf: Callable[..., Tokenizer]) -> None:
    key = "tokenizer.chat_template"
    for metadata, expected in (
        ({f"{key}.rag": "B", key: "A", "tokenizer.chat_templates": ["rag"]}, "A"),
        ({f"{key}.rag": "B", f"{key}.default": "A"}, "A"),
        ({key: 3}, None),
        ({}, None),
    ):
        assert gguf(metadata=metadata).chat_template == expected
    only = gguf(metadata={f"{key}.tool_use": "A", f"{key}.rag": "B"})
    assert only.chat_template == "A"
    assert "of the chat templates tool_use, rag none is called default: tool_use is used" in only.notes


def test_longer_lists_than_tokens_are_read(gguf: Callable[..., Tokenizer]) -> None:
    """As llama.cpp does; shorter ones are damage."""
    vocab, _ = words(sentencepiece())
    size = len(vocab) + 2
    longer = gguf("llama", scores=[0.0] * (size + 3), token_type=[1] * (size + 3), metadata={})
    assert longer.vocab_size == size


@pytest.mark.parametrize(
    ("metadata", "strips"),
    [
        ({"general.name": "Phi-3.5 MoE Instruct"}, True),
        ({"general.architecture": "phimoe"}, True),
        ({"general.architecture": "phimoe", "tokenizer.ggml.added_tokens.complete": True}, False),
        ({"general.name": "Mixtral"}, False),
    ],
)
def test_control_tokens_of_phi_3_take_the_spaces_after_them(
    gguf: Callable[..., Tokenizer], metadata: dict[str, Any], strips: bool
) -> None:
    tokenizer = gguf("llama", metadata=metadata)
    (mark,) = tokenizer._encode("<|im_start|>")
    assert (tokenizer._encode("<|im_start|>\n x")[1:] == tokenizer._encode("<|im_start|>x")[1:]) is strips
    assert tokenizer._encode("<|im_start|>\n x")[0] == mark
    assert tokenizer._encode("<s>\nx") != tokenizer._encode("<s>x")


def test_gemma_4_always_has_bos(gguf: Callable[..., Tokenizer]) -> None:
    tokenizer = gguf("gemma4", bos_token_id=1, add_bos_token=False, merges=[])
    assert tokenizer.encode("x")[0] == 1
