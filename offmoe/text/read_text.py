"""Text from files and pipes: UTF-8, with or without a byte order mark, which is no part of the text."""

from __future__ import annotations

import codecs
from pathlib import Path

from offmoe.errors import OffmoeError


def read_text(path: Path) -> str:
    """Return the text of a file without its byte order mark. Raises OffmoeError if it cannot be read as UTF-8."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise OffmoeError(f"cannot read {path}: {error.strerror}") from None
    return decode_text(raw, str(path))


def decode_text(raw: bytes, source: str, offset: int = 0) -> str:
    """Return the text of `raw`, which begins `offset` bytes after the start of `source`.

    Only the start of the source can hold a byte order mark. Raises OffmoeError that names the first invalid byte.
    """
    mark = codecs.BOM_UTF8 if offset == 0 and raw.startswith(codecs.BOM_UTF8) else b""
    try:
        return raw[len(mark) :].decode("utf-8")
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        utf16 = offset == 0 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found = "but UTF-16: convert it first" if utf16 else f"byte 0x{raw[at]:02x} at offset {offset + at}"
        raise OffmoeError(f"{source} is not UTF-8{', ' if utf16 else ': '}{found}") from None
