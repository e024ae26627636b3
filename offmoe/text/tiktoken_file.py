"""Vocabularies as tiktoken keeps them: a base64 token and its rank a line, the rank being id and priority.

How text is cut and what the special tokens are stands in the checkpoint's own Python, which is never run: here it is
known by the name of the tokenizer's class (tokenization_kimi.py, tokenization_hy.py, tokenization_qwen.py).
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
from offmoe.text.byte_unicode import bytes_to_letters
from offmoe.text.pretokenizers import build, kind_of

EXTRAS = tuple(f"<|extra_{i}|>" for i in range(205))
HY = "<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", *EXTRAS
QWEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", *EXTRAS


@dataclass(frozen=True)
class Layout:
    """What one tokenizer class makes of its file."""

    file: str
    cut: str  # as GGUF names it
    specials: tuple[str, ...] = ()  # behind the ranks
    reserved: int = 0  # ids behind the ranks, which tokenizer_config.json may name
    nfc: bool = False  # text is normalised first


LAYOUTS = {
    "TikTokenTokenizer": Layout("tiktoken.model", "kimi-k2", reserved=256),
    "HYTokenizer": Layout("hy.tiktoken", "hunyuan", HY, nfc=True),
    "QWenTokenizer": Layout("qwen.tiktoken", "qwen2", QWEN, nfc=True),
}


def open_tiktoken(path: Path, config: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of a directory with a tiktoken file; None where it has none. config: tokenizer_config.json."""
    files = [*path.glob("*.tiktoken"), *path.glob("tiktoken.model")]
    if not files:
        return None
    name = config.get("tokenizer_class")
    layout = LAYOUTS.get(name) if isinstance(name, str) else None
    if layout is None or not (path / layout.file).is_file():
        known = ", ".join(f"{name} with {layout.file}" for name, layout in LAYOUTS.items())
        raise OffmoeError(
            f"{files[0]} of the tokenizer class {name!r} is not supported: known are {known}, or a tokenizer.json"
        )
    ranks = read_ranks(path / layout.file)
    tokenizer = Tokenizer(models.BPE(letters(ranks), list(merges(ranks)), ignore_merges=True))
    tokenizer.pre_tokenizer = build(kind_of(layout.cut))
    tokenizer.decoder = decoders.ByteLevel()
    if layout.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(special_tokens(layout, len(ranks), config.get("added_tokens_decoder")))
    return tokenizer


def read_ranks(file: Path) -> dict[bytes, int]:
    """Tokens by rank; one that stands there twice counts once, as in tokenization_hy.py."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token = base64.b64decode(line.split()[0], validate=True)
            rank = int(line.split()[1])
        except (ValueError, IndexError, binascii.Error):
            raise OffmoeError(f"{file} is damaged: line {number} is no base64 token and its rank") from None
        if rank not in (len(ranks), number - 1):
            raise OffmoeError(f"{file} is damaged: line {number} has rank {rank}, expected {len(ranks)}")
        ranks.setdefault(token, len(ranks))
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise OffmoeError(f"{file} is damaged: the byte 0x{missing[0]:02x} has no rank")
    return ranks


def letters(ranks: dict[bytes, int]) -> dict[str, int]:
    return {bytes_to_letters(token): rank for token, rank in ranks.items()}


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[str, str]]:
    """Every way to make a token of two others: the lowest rank of the whole merges first, as in tiktoken."""
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        for left, right in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            yield bytes_to_letters(left), bytes_to_letters(right)


def special_tokens(layout: Layout, first: int, named: Any) -> list[AddedToken]:
    """The tokens from id `first` on. named: `added_tokens_decoder`, which may say more about them."""
    named = named if isinstance(named, dict) else {}
    texts = {first + i: text for i, text in enumerate(layout.specials)}
    texts |= {id: f"<|reserved_token_{id}|>" for id in range(first, first + layout.reserved)}
    added = []
    for id, text in texts.items():
        entry = named.get(str(id))
        entry = entry if isinstance(entry, dict) and isinstance(entry.get("content"), str) else {"content": text}
        added.append(AddedToken(entry["content"], special=bool(entry.get("special", True)), normalized=False))
    return added
