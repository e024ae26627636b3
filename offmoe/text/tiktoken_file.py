"""Vocabularies in tiktoken's file format: one base64 token and its rank per line; the rank is both id and merge
priority.

How text is split and which special tokens exist is written in the checkpoint's own Python code, which is never run. It
is looked up by the name of the tokenizer's class (tokenization_kimi.py, tokenization_hy.py, tokenization_qwen.py).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from offmoe.errors import OffmoeError
from offmoe.text.byte_unicode import bytes_to_unicode
from offmoe.text.pretokenizers import build_pre_tokenizer, find_kind

EXTRAS = tuple(f"<|extra_{i}|>" for i in range(205))
HY = "<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", *EXTRAS
QWEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", *EXTRAS


@dataclass(frozen=True)
class TiktokenLayout:
    """File name, pre-tokenizer and special tokens that one tokenizer class uses."""

    file: str
    pre_tokenizer: str  # its name in GGUF files
    specials: tuple[str, ...] = ()  # their ids follow the ranks
    reserved: int = 0  # number of ids after the ranks, which tokenizer_config.json may name
    nfc: bool = False  # normalise text to NFC first


LAYOUTS = {
    "TikTokenTokenizer": TiktokenLayout("tiktoken.model", "kimi-k2", reserved=256),
    "HYTokenizer": TiktokenLayout("hy.tiktoken", "hunyuan", HY, nfc=True),
    "QWenTokenizer": TiktokenLayout("qwen.tiktoken", "qwen2", QWEN, nfc=True),
}


def open_tiktoken(path: Path, config: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of a directory with a tiktoken file, or None if there is no such file.

    `config` is tokenizer_config.json. Raises OffmoeError if the tokenizer class is unknown or the file is damaged.
    """
    files = [*path.glob("*.tiktoken"), *path.glob("tiktoken.model")]
    if not files:
        return None
    name = config.get("tokenizer_class")
    layout = LAYOUTS.get(name) if isinstance(name, str) else None
    if layout is None or not (path / layout.file).is_file():
        known = ", ".join(f"{name} with {layout.file}" for name, layout in LAYOUTS.items())
        raise OffmoeError(
            f"{files[0]} of the tokenizer class {name!r} is not supported: expected {known}, or a tokenizer.json"
        )
    ranks = read_ranks(path / layout.file)
    tokenizer = Tokenizer(models.BPE(unicode_vocab(ranks), list(merges(ranks)), ignore_merges=True))
    tokenizer.pre_tokenizer = build_pre_tokenizer(find_kind(layout.pre_tokenizer))
    tokenizer.decoder = decoders.ByteLevel()
    if layout.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(special_tokens(layout, len(ranks), config.get("added_tokens_decoder")))
    return tokenizer


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read a tiktoken file: token → rank. A token that appears twice counts once, as in tokenization_hy.py."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token = base64.b64decode(line.split()[0], validate=True)
            rank = int(line.split()[1])
        except (ValueError, IndexError, binascii.Error):
            raise OffmoeError(f"{file} is damaged: line {number} is not a base64 token and its rank") from None
        if rank not in (len(ranks), number - 1):
            raise OffmoeError(f"{file} is damaged: line {number} has rank {rank}, expected {len(ranks)}")
        ranks.setdefault(token, len(ranks))
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise OffmoeError(f"{file} is damaged: the byte 0x{missing[0]:02x} has no rank")
    return ranks


def unicode_vocab(ranks: dict[bytes, int]) -> dict[str, int]:
    """Return the vocabulary with its bytes as GPT-2's Unicode characters."""
    return {bytes_to_unicode(token): rank for token, rank in ranks.items()}


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[str, str]]:
    """Yield every pair of tokens that makes a third one, by ascending rank of the merged token, as tiktoken merges."""
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:split_kind], token[split_kind:]) for split_kind in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        for left, right in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            yield bytes_to_unicode(left), bytes_to_unicode(right)


def special_tokens(layout: TiktokenLayout, first: int, named: Any) -> list[AddedToken]:
    """Return the special tokens, whose ids start at `first`.

    `named` is tokenizer_config.json's `added_tokens_decoder`, which may override text and kind.
    """
    named = named if isinstance(named, dict) else {}
    texts = {first + i: text for i, text in enumerate(layout.specials)}
    texts |= {id: f"<|reserved_token_{id}|>" for id in range(first, first + layout.reserved)}
    added = []
    for id, text in texts.items():
        entry = named.get(str(id))
        entry = entry if isinstance(entry, dict) and isinstance(entry.get("content"), str) else {"content": text}
        added.append(AddedToken(entry["content"], special=bool(entry.get("special", True)), normalized=False))
    return added
