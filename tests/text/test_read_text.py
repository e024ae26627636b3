"""Byte order marks are no part of a text; bytes that are not UTF-8 are named."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from offmoe.errors import OffmoeError
from offmoe.text.read_text import decode_text, read_text


def test_mark_at_the_start_is_dropped_and_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(codecs.BOM_UTF8 + "Grüße\ufeff\r\n".encode())
    assert read_text(file) == "Grüße\ufeff\r\n"
    assert decode_text(codecs.BOM_UTF8 * 2, "x") == "\ufeff"
    assert decode_text(codecs.BOM_UTF8 + b"a", "x", offset=7) == "\ufeffa"  # a later line of the same pipe
    assert decode_text(b"", "x") == ""


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"abc\xe9", "a.txt is not UTF-8: byte 0xe9 at offset 3"),
        (codecs.BOM_UTF8 + b"a\xff", "a.txt is not UTF-8: byte 0xff at offset 4"),
        ("\ufeffab".encode("utf-16-le"), "a.txt is not UTF-8, but UTF-16: convert it first"),
        ("\ufeffab".encode("utf-16-be"), "a.txt is not UTF-8, but UTF-16: convert it first"),
    ],
)
def test_other_encodings_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(raw)
    with pytest.raises(OffmoeError) as error:
        read_text(file)
    assert str(error.value).endswith(message)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OffmoeError, match=r"cannot read .*: Is a directory"):
        read_text(tmp_path)
