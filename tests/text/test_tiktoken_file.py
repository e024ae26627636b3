"""tiktoken files: merging by rank, special tokens after the ranks, damaged and unknown files."""

from __future__ import annotations

import base64
import random
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizer_files import Files, expect_error, load, write
from trained_tokenizers import CORPUS, byte_level, words
from unicode_texts import texts

from offmoe.text.byte_unicode import bytes_to_unicode, unicode_to_bytes
from offmoe.text.pretokenizers import build_pre_tokenizer, find_kind
from offmoe.text.tiktoken_file import LAYOUTS


def ranks() -> list[bytes]:
    """Return all bytes, some merged tokens, and two tokens that no merge produces."""
    _, merges = words(byte_level())
    made = dict.fromkeys(left + right for left, right in merges)
    return [*(bytes([byte]) for byte in range(256)), *map(unicode_to_bytes, made), b" zehn", b"zzzz"]


def written(file: Path, tokens: list[bytes]) -> None:
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))
    file.write_bytes(b"".join(lines))


def merged(piece: bytes, rank: dict[bytes, int]) -> list[int]:
    """Apply tiktoken's rule naively: merge the leftmost pair of the lowest rank until none is left."""
    if piece in rank:
        return [rank[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while pairs := [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [rank[part] for part in parts]


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_are_those_of_merging_by_rank(name: str, tmp_path: Path) -> None:
    layout, tokens = LAYOUTS[name], ranks()
    written(tmp_path / layout.file, tokens)
    write(tmp_path, "tokenizer_config.json", tokenizer_class=name)
    tokenizer, pre_tokenizer = load(Files(tmp_path)), build_pre_tokenizer(find_kind(layout.pre_tokenizer))
    rank = {token: id for id, token in enumerate(tokens)}
    chance = random.Random(1)
    words = ("".join(chance.choices("thequick brownfxjmpsvlazydg", k=40)) for _ in range(500))
    for text in (*CORPUS[:2], *words, "neun zehn zehn zzzz", *texts()[:2000]):
        said = unicodedata.normalize("NFC", text) if layout.nfc else text
        pieces = [unicode_to_bytes(letters) for letters, _ in pre_tokenizer.pre_tokenize_str(said)]
        ids = tokenizer.encode(text)
        assert ids == [id for piece in pieces for id in merged(piece, rank)], ascii(text)
        assert tokenizer.decode(ids) == said
    tokenizer.close()


def test_as_tiktoken_itself(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokens = ranks()
    written(tmp_path / "tiktoken.model", tokens)
    write(tmp_path, "tokenizer_config.json", tokenizer_class="TikTokenTokenizer")
    rank = {token: id for id, token in enumerate(tokens)}
    (pattern,) = find_kind("kimi-k2").patterns
    other = tiktoken.Encoding("k", pat_str=pattern, mergeable_ranks=rank, special_tokens={})
    tokenizer = load(Files(tmp_path))
    for text in texts():
        assert tokenizer.encode(text) == other.encode(text, disallowed_special=()), ascii(text)
    tokenizer.close()


def test_special_tokens_of_kimi(tmp_path: Path) -> None:
    """256 ids follow the ranks; the config names some of them, and those that are not special are text."""
    written(tmp_path / "tiktoken.model", ranks())
    first = len(ranks())
    named = {
        str(first): {"content": "[BOS]", "special": True},
        str(first + 3): {"content": "<|im_end|>", "special": True},
        str(first + 9): {"content": "<think>", "special": False},
    }
    fields = {"added_tokens_decoder": named, "bos_token": "[BOS]", "chat_template": "T"}
    write(tmp_path, "tokenizer_config.json", tokenizer_class="TikTokenTokenizer", **fields)
    write(tmp_path, "generation_config.json", eos_token_id=first + 3)
    tokenizer = load(Files(tmp_path))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (first, {first + 3}, first + 256)
    ids = tokenizer.encode("[BOS]a<think>b<|im_end|>")
    assert [ids[0], ids[2], ids[4]] == [first, first + 9, first + 3]
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.encode(f"<|reserved_token_{first + 7}|>") == [first + 7]
    assert tokenizer.chat_template == "T"
    tokenizer.close()


def test_special_tokens_of_hunyuan(tmp_path: Path) -> None:
    tokens = ranks()
    written(tmp_path / "hy.tiktoken", [*tokens[:300], tokens[5], *tokens[300:]])  # one token twice counts once
    write(tmp_path, "tokenizer_config.json", tokenizer_class="HYTokenizer", eos_token="<|eos|>")
    tokenizer = load(Files(tmp_path))
    assert tokenizer.encode("<|startoftext|><|extra_4|>") == [len(tokens) + 1, len(tokens) + 9]
    assert tokenizer.encode(tokens[300].decode()) == [300]
    assert len(tokens) + 3 in tokenizer.eos
    tokenizer.close()


def test_files_that_are_not_known(tmp_path: Path) -> None:
    written(tmp_path / "tiktoken.model", ranks())
    expect_error(Files(tmp_path), "tiktoken.model of the tokenizer class None is not supported: expected TikTok")
    write(tmp_path, "tokenizer_config.json", tokenizer_class="HYTokenizer")
    expect_error(Files(tmp_path), "HYTokenizer with hy.tiktoken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda raw: raw.replace(b"\n", b" x\n", 1).replace(b"AA==", b"!!!!"),
            "line 1 is not a base64 token and its rank",
        ),
        (lambda raw: raw.replace(b" 7\n", b" seven\n"), "line 8 is not a base64 token and its rank"),
        (lambda raw: raw.replace(b" 7\n", b"\n"), "line 8 is not a base64 token and its rank"),
        (lambda raw: raw.replace(b" 7\n", b" 9\n"), "line 8 has rank 9, expected 7"),
        (lambda raw: b"".join(raw.splitlines(True)[:200]), "the byte 0xc8 has no rank"),
        (lambda raw: b"", "the byte 0x00 has no rank"),
    ],
)
def test_damaged_files(tmp_path: Path, change: object, message: str) -> None:
    written(tmp_path / "tiktoken.model", ranks())
    write(tmp_path, "tokenizer_config.json", tokenizer_class="TikTokenTokenizer")
    raw = (tmp_path / "tiktoken.model").read_bytes()
    (tmp_path / "tiktoken.model").write_bytes(change(raw))  # type: ignore[operator]
    expect_error(Files(tmp_path), message)


def test_bytes_to_unicode() -> None:
    every = bytes(range(256))
    assert unicode_to_bytes(bytes_to_unicode(every)) == every
    assert bytes_to_unicode(b"a \n") == "aĠĊ"
