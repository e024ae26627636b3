"""The header of a GGUF: metadata and tensor table, bounds-checked. What nobody reads may be damaged."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from offmoe.checkpoint.base import DataFile, quote
from offmoe.checkpoint.first_bytes import PEEK, found_instead
from offmoe.errors import OffmoeError

HEADER_LIMIT = 64 << 20  # bytes of metadata and tensor table; with 262,144 tokens a header has about 12 MB
ENTRY_LIMIT = 1 << 16  # number of keys, and of tensors; the largest models have a few thousand tensors
ELEMENT_LIMIT = 1 << 22  # array elements in total: as Python objects they take about 60 bytes each
MOST_DIMENSIONS = 8  # ggml has 4
MOST_NESTED = 8  # arrays within arrays
PIECE = 1 << 20  # bytes read at once, at least
LONG = 1 << 20  # a string of more bytes is only kept if somebody reads it
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
TEXTS = {  # keys whose strings are read: every byte of them counts
    "general.architecture",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
}
READ = ("general.architecture", "general.type", "general.alignment", "tokenizer.", "split.")  # beginnings of read keys
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


class Header:
    """A cursor over the header of a file, which is read in growing pieces on demand."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.data = bytearray()
        self.start = 0  # where `data` begins in the file: after the last string that was passed over
        self.position = 0  # in `data`
        self.elements = 0  # array elements read so far

    @property
    def offset(self) -> int:
        """Position in the file."""
        return self.start + self.position

    def damaged(self, reason: str) -> OffmoeError:
        """Return the error for a damaged file."""
        return OffmoeError(f"{self.file.path} is damaged: {reason}; copy it again")

    def ensure(self, nbytes: int) -> None:
        """Make the next `nbytes` bytes available in `data`. Raises OffmoeError if the header is too long."""
        end, available = self.position + nbytes, len(self.data)
        if end <= available:
            return
        left = self.file.size - self.start
        if end > left:
            raise self.damaged(f"its header runs to byte {self.start + end} and the file ends at {self.file.size}")
        if end > HEADER_LIMIT:
            raise self.damaged(f"its header runs to byte {self.start + end}, beyond the limit of {HEADER_LIMIT}")
        wanted = min(max(end, 2 * available, PIECE), left)
        self.data += self.file.read(self.start + available, wanted - available).numpy().tobytes()

    def skip(self, nbytes: int) -> None:
        """Pass over `nbytes` bytes, which are not read."""
        self.start, self.position = self.offset + nbytes, 0
        self.data = bytearray()
        if self.start > self.file.size:
            raise self.damaged(f"its header runs to byte {self.start} and the file ends at {self.file.size}")

    def number(self, kind: struct.Struct) -> int:
        """Read one integer."""
        self.ensure(kind.size)
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return int(value)

    def count(self, what: str, limit: int) -> int:
        """Read a number of items. Raises OffmoeError if it exceeds `limit`; `what` names the items."""
        value = self.number(U64)
        if value > limit:
            raise self.damaged(f"it claims {value} {what}, more than the limit of {limit}")
        return value

    def string(self) -> str:
        """Read a string; bytes that are not UTF-8 become U+FFFD."""
        return self.strings(1)[0].decode(errors="replace")

    def strings(self, count: int) -> list[bytearray]:
        """Read `count` strings in one flat loop, 0.3 µs each: a vocabulary has 150,000."""
        data, position, found = self.data, self.position, []
        for _ in range(count):
            if position + 8 > len(data):
                self.position = position
                self.ensure(8)
            end = position + 8 + U64.unpack_from(data, position)[0]
            if end > len(data):
                self.position = position
                self.ensure(end - position)
            found.append(data[position + 8 : end])
            position = end
        self.position = position
        return found

    def numbers(self, kind: int, count: int) -> list[Any]:
        """Read `count` numbers of a GGUF type."""
        if kind not in NUMBERS:
            raise self.damaged(f"a metadata value has the unknown type {kind}")
        dtype = np.dtype(NUMBERS[kind])
        self.ensure(count * dtype.itemsize)
        values = np.frombuffer(bytes(self.data[self.position : self.position + count * dtype.itemsize]), dtype)
        self.position += count * dtype.itemsize
        return list(values.tolist())

    def texts(self, key: str, count: int) -> list[str]:
        """Read the strings of a key. Where somebody reads it, every byte counts, else U+FFFD stands for a bad one."""
        if not is_read(key):
            return [text.decode(errors="replace") for text in self.strings(count)]
        texts = self.strings(count)
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError:
            bad = next(number for number, text in enumerate(texts) if not is_utf8(text))
            which = f"{key}[{bad}]" if count > 1 else key
            raise self.damaged(f"{which} is not UTF-8 ({quote(bytes(texts[bad]))})") from None

    def text(self, key: str) -> str:
        """Read one string of a key; a long one that nobody reads is passed over."""
        nbytes = self.number(U64)
        if nbytes > LONG and not is_read(key):
            self.skip(nbytes)
            return ""
        self.position -= 8
        return self.texts(key, 1)[0]

    def value(self, key: str, kind: int, depth: int = 0) -> Any:
        """Read the value of a key: a string, a number, or an array (element type, count, elements)."""
        if kind == STRING:
            return self.text(key)
        if kind != ARRAY:
            return self.numbers(kind, 1)[0]
        of = self.number(U32)
        count = self.count("array elements", ELEMENT_LIMIT - self.elements)
        self.elements += count
        if of == ARRAY:
            if depth == MOST_NESTED:
                raise self.damaged(f"{quote(key)} nests more than {MOST_NESTED} arrays")
            return [self.value(key, ARRAY, depth + 1) for _ in range(count)]
        return self.texts(key, count) if of == STRING else self.numbers(of, count)

    def metadata(self, count: int) -> dict[str, Any]:
        """Read `count` keys with their values. Raises OffmoeError if one that is read has two values."""
        table: dict[str, Any] = {}
        twice = set()
        for _ in range(count):
            key = self.string()
            value = self.value(key, self.number(U32))
            if key in table and table[key] != value:
                twice.add(key)
            table.setdefault(key, value)
        read = (*READ, f"{table.get('general.architecture')}.")
        if clash := next((key for key in sorted(twice) if key.startswith(read)), None):
            raise self.damaged(f"the key {quote(clash)} appears twice with different values")
        return table

    def tensors(self, count: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
        """Read `count` entries of the tensor table. Raises OffmoeError if a name appears twice."""
        table: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self.string()
            if name in table:
                raise self.damaged(f"the tensor {quote(name)} appears twice")
            table[name] = self.tensor()
        return table

    def tensor(self) -> tuple[int, tuple[int, ...], int]:
        """Read one tensor's ggml type, shape in torch's order, and offset from the start of the data."""
        dims = self.number(U32)
        if dims > MOST_DIMENSIONS:
            raise self.damaged(f"a tensor has {dims} dimensions, expected at most {MOST_DIMENSIONS}")
        shape = tuple(self.number(U64) for _ in range(dims))[::-1]
        return self.number(U32), shape, self.number(U64)


def is_read(key: str) -> bool:
    """Return whether somebody reads the strings of a key; templates may have a name after a dot."""
    return key in TEXTS or key.startswith("tokenizer.chat_template")


def is_utf8(text: bytearray) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_magic(header: Header) -> None:
    """Raise OffmoeError unless the file is a little-endian GGUF of version 2 or 3."""
    path, size = header.file.path, header.file.size
    start = header.file.read(0, min(size, PEEK)).numpy().tobytes()
    if start[:4] != b"GGUF":
        found = found_instead(start, size) or (
            f"it starts with {start[:4]!r}, not b'GGUF'; give a .gguf file or a directory of safetensors"
        )
        raise OffmoeError(f"{path} is not a GGUF file: {found}")
    header.position = 4
    version = header.number(U32)
    if version and version & 0xFFFF == 0:
        raise OffmoeError(
            f"{path} is a big-endian GGUF: only little-endian files are supported; convert the model again"
        )
    if version not in (2, 3):
        raise OffmoeError(f"{path} is a GGUF of version {version}: expected 2 or 3; convert the model again")
