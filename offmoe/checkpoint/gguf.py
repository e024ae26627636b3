"""GGUF headers, parsed and bounds-checked before anything else uses the file."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from offmoe.checkpoint.base import EMPTY, ByteRange, Checkpoint, DataFile, TensorInfo, check_ranges, join_names, quote
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import GGML

HEADER_LIMIT = 64 << 20  # bytes of metadata and tensor table; with 262,144 tokens a header has about 12 MB
ENTRY_LIMIT = 1 << 16  # number of keys, and of tensors; the largest models have a few thousand tensors
ELEMENT_LIMIT = 1 << 22  # array elements in total: as Python objects they take about 60 bytes each
MOST_DIMENSIONS = 8  # ggml has 4
PIECE = 1 << 20  # bytes read at once, at least
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
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
FORMAT_OF_TYPE = {fmt.gguf_type: fmt for fmt in GGML.values()}
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


class Header:
    """A cursor over the header of a file, which is read in growing pieces on demand."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.data = bytearray()
        self.position = 0
        self.elements = 0  # array elements read so far

    def damaged(self, reason: str) -> OffmoeError:
        """Return the error for a damaged file."""
        return OffmoeError(f"{self.file.path} is damaged: {reason}; copy it again")

    def ensure(self, nbytes: int) -> None:
        """Make the next `nbytes` bytes available in `data`. Raises OffmoeError if the header is too long."""
        end, available = self.position + nbytes, len(self.data)
        if end <= available:
            return
        if end > self.file.size:
            raise self.damaged(f"its header runs to byte {end} and the file ends at {self.file.size}")
        if end > HEADER_LIMIT:
            raise self.damaged(f"its header runs to byte {end}, beyond the limit of {HEADER_LIMIT}")
        self.data += (
            self.file.read(available, min(max(end, 2 * available, PIECE), self.file.size) - available).numpy().tobytes()
        )

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
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Read `count` strings in one flat loop, 0.4 µs each: a vocabulary has 150,000."""
        data, position, found = self.data, self.position, []
        for _ in range(count):
            if position + 8 > len(data):
                self.position = position
                self.ensure(8)
            end = position + 8 + U64.unpack_from(data, position)[0]
            if end > len(data):
                self.position = position
                self.ensure(end - position)
            try:
                found.append(data[position + 8 : end].decode())
            except UnicodeDecodeError:
                raise self.damaged(f"the string at byte {position + 8} is not UTF-8") from None
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

    def values(self, kind: int, count: int) -> list[Any]:
        return self.strings(count) if kind == STRING else self.numbers(kind, count)

    def value(self, kind: int) -> Any:
        return self.array() if kind == ARRAY else self.values(kind, 1)[0]

    def array(self) -> list[Any]:
        """Read a metadata array: element type, count, elements."""
        kind = self.number(U32)
        if kind == ARRAY:
            raise self.damaged("a metadata value is an array of arrays, which no supported model uses")
        count = self.count("array elements", ELEMENT_LIMIT - self.elements)
        self.elements += count
        return self.values(kind, count)

    def entries(self, what: str, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        """Read `count` entries of a name and a value, which `read` parses.

        Raises OffmoeError if a name appears twice.
        """
        table: dict[str, Any] = {}
        for _ in range(count):
            name = self.string()
            if name in table:
                raise self.damaged(f"the {what} {quote(name)} appears twice")
            table[name] = read()
        return table

    def tensor(self) -> tuple[int, tuple[int, ...], int]:
        """Read one tensor's ggml type, shape in torch's order, and offset from the start of the data."""
        dims = self.number(U32)
        if dims > MOST_DIMENSIONS:
            raise self.damaged(f"a tensor has {dims} dimensions, expected at most {MOST_DIMENSIONS}")
        shape = tuple(self.number(U64) for _ in range(dims))[::-1]
        return self.number(U32), shape, self.number(U64)


@cache
def type_name(kind: int) -> str:
    """Return ggml's name of a tensor type, for errors."""
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(kind).name) if kind in list(GGMLQuantizationType) else f"number {kind}"


def check_magic(header: Header) -> None:
    """Raise OffmoeError unless the file is a little-endian GGUF of version 2 or 3."""
    path, size = header.file.path, header.file.size
    start = header.file.read(0, min(size, 8)).numpy().tobytes()
    if start[:4] != b"GGUF":
        pickled = start[:2] == b"PK" or start[:1] == b"\x80"
        found = "it is a pickle, which is never loaded" if pickled else f"it starts with {start[:4]!r}, not b'GGUF'"
        raise OffmoeError(f"{path} is not a GGUF file: {found}; give a .gguf file or a directory of safetensors")
    header.position = 4
    version = header.number(U32)
    if version and version & 0xFFFF == 0:
        raise OffmoeError(
            f"{path} is a big-endian GGUF: only little-endian files are supported; convert the model again"
        )
    if version not in (2, 3):
        raise OffmoeError(f"{path} is a GGUF of version {version}: expected 2 or 3; convert the model again")


def parse(file: DataFile, number: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return the metadata and the tensors of one file, which is the checkpoint's file `number`."""
    header = Header(file)
    check_magic(header)
    tensor_count = header.count("tensors", ENTRY_LIMIT)
    key_count = header.count("metadata keys", ENTRY_LIMIT)
    metadata = header.entries("key", key_count, lambda: header.value(header.number(U32)))
    found = header.entries("tensor", tensor_count, header.tensor)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.damaged(f"general.alignment is {quote(alignment)}, not a power of two")
    start = -(-header.position // alignment) * alignment
    offsets = sorted({offset for _, _, offset in found.values()})
    ends = dict(zip(offsets, [*offsets[1:], file.size - start], strict=True))  # at most: where the next tensor begins
    tensors = {}
    for name, (kind, shape, offset) in found.items():
        if offset % alignment:
            raise header.damaged(f"tensor {quote(name)} starts at {offset}, not a multiple of {alignment}")
        fmt, cols = FORMAT_OF_TYPE.get(kind), shape[-1] if shape else 1
        if fmt is None:
            extent = ByteRange(number, start + offset, max(0, ends[offset] - offset))
            refusal = f"has the format {type_name(kind)}: expected one of {', '.join(GGML)}"
            tensors[name] = TensorInfo(name, type_name(kind), shape, extent, refusal=refusal)
            continue
        if cols % fmt.block:
            raise header.damaged(f"a {fmt.name} tensor has rows of {cols} weights, not a multiple of {fmt.block}")
        extent = ByteRange(number, start + offset, fmt.nbytes(prod(shape[:-1]), cols))
        tensors[name] = TensorInfo(name, fmt.name, shape, extent, refusal="" if extent.nbytes else EMPTY)
    check_ranges(file, tensors.values(), start)
    return metadata, tensors


def split_paths(path: Path, count: object) -> list[Path]:
    """Return the paths of all `count` parts. Raises OffmoeError if some are missing."""
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise OffmoeError(f"{path} is one of {quote(count)} parts: expected a name such as model-00001-of-00003.gguf")
    paths = [path.with_name(f"{match[1]}-{part:05}-of-{match[3]}.gguf") for part in range(1, int(match[3]) + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        raise OffmoeError(
            f"{path} is one of {count} parts, and its directory lacks {join_names(missing)}: download them all"
        )
    return paths


def merge_parts(files: list[DataFile]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return the first part's metadata and the tensors of all parts.

    Raises OffmoeError if they do not belong together.
    """
    parts = [parse(file, number) for number, file in enumerate(files)]
    tensors: dict[str, TensorInfo] = {}
    for number, (file, (metadata, found)) in enumerate(zip(files, parts, strict=True)):
        if (metadata.get("split.no"), metadata.get("split.count")) != (number, len(files)):
            raise OffmoeError(f"{file.path} has another part number in its header than in its name: download it again")
        if duplicates := tensors.keys() & found.keys():
            raise OffmoeError(
                f"{file.path} has the same tensors as another part: {join_names(map(quote, sorted(duplicates)))}"
            )
        tensors |= found
    if parts[0][0].get("split.tensors.count", len(tensors)) != len(tensors):
        raise OffmoeError(
            f"{files[0].path}: its parts have {len(tensors)} tensors, not the number in its header: download them again"
        )
    return parts[0][0], tensors


def open_gguf(path: Path) -> Checkpoint:
    """Open a .gguf file, or all files of a split one given any part. Raises OffmoeError if anything is wrong."""
    with ExitStack() as stack:
        file = stack.enter_context(DataFile(path))
        metadata, tensors = parse(file, 0)
        files, count = [file], metadata.get("split.count", 0)
        if count not in (0, 1):
            parts = split_paths(path, count)
            files = [file if part == path else stack.enter_context(DataFile(part)) for part in parts]
            metadata, tensors = merge_parts(files)
        stack.pop_all()
    return Checkpoint(path, "gguf", files, tensors, metadata)
