"""GPT-2's byte-to-Unicode mapping: printable bytes map to themselves, all others to the characters from U+0100 on."""

from __future__ import annotations

PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
CHAR_TO_BYTE = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(UNPRINTABLE)}
BYTE_TO_CHAR = {byte: letter for letter, byte in CHAR_TO_BYTE.items()}


def unicode_to_bytes(text: str) -> bytes:
    """Return the bytes that the characters of `text` stand for, or its UTF-8 if a character is not in the mapping."""
    try:
        return bytes([CHAR_TO_BYTE[char] for char in text])
    except KeyError:
        return text.encode()


def bytes_to_unicode(raw: bytes) -> str:
    """Return one character per byte of `raw`."""
    return "".join([BYTE_TO_CHAR[byte] for byte in raw])
