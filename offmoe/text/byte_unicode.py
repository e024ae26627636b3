"""GPT-2's letters for bytes: printable ones as themselves, the others as the letters from U+0100 on."""

from __future__ import annotations

PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}
LETTERS = {byte: letter for letter, byte in BYTES.items()}


def letters_to_bytes(text: str) -> bytes:
    """The bytes that `text` stands for; a text with other letters stands for itself."""
    try:
        return bytes([BYTES[letter] for letter in text])
    except KeyError:
        return text.encode()


def bytes_to_letters(raw: bytes) -> str:
    return "".join([LETTERS[byte] for byte in raw])
