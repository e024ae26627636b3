"""GGUF headers, parsed and bounds-checked here before anything else looks at the file."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from offmoe.checkpoint.base import ByteRange, Checkpoint, DataFile, TensorInfo, check_places, shown, some
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import GGML, Format

HEADER_LIMIT = 64 << 20  # key/values and tensor table; with 262,144 tokens a header has about 12 MB
ENTRY_LIMIT = 1 << 16  # keys, and tensors; the largest models have a few thousand tensors
ELEMENT_LIMIT = 1 << 22  # of all arrays together: as Python objects they take about 60 bytes each
PIECE = 1 << 20
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "?",
           10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
FORMAT_OF_TYPE = {form.gguf_type: form for form in GGML.values()}
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


class Header:
    """A cursor over the front of a file, which is read in growing pieces as the cursor needs them."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.data = bytearray()
        self.at = 0
        self.elements = 0  # of arrays, so far

    def damaged(self, what: str) -> OffmoeError:
        return OffmoeError(f"{self.file.path} is damaged: {what}; copy it anew")

    def need(self, nbytes: int) -> None:
        """Makes `nbytes` after the cursor available."""
        end, have = self.at + nbytes, len(self.data)
        if end <= have:
            return
        if end > self.file.size:
            raise self.damaged(f"its header runs to byte {end} and the file ends at {self.file.size}")
        if end > HEADER_LIMIT:
            raise self.damaged(f"its header runs to byte {end}, beyond the limit of {HEADER_LIMIT}")
        self.data += self.file.read(have, min(max(end, 2 * have, PIECE), self.file.size) - have).numpy().tobytes()

    def number(self, kind: struct.Struct) -> int:
        self.need(kind.size)
        (value,) = kind.unpack_from(self.data, self.at)
        self.at += kind.size
        return int(value)

    def count(self, what: str, limit: int) -> int:
        value = self.number(U64)
        if value > limit:
            raise self.damaged(f"it claims {value} {what}, more than the limit of {limit}")
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """A vocabulary is 150,000 of these: one flat loop, 0.4 µs each."""
        data, at, found = self.data, self.at, []
        for _ in range(count):
            if at + 8 > len(data):
                self.at = at
                self.need(8)
            end = at + 8 + U64.unpack_from(data, at)[0]
            if end > len(data):
                self.at = at
                self.need(end - at)
            try:
                found.append(data[at + 8 : end].decode())
            except UnicodeDecodeError:
                raise self.damaged(f"the string at byte {at + 8} is no UTF-8") from None
            at = end
        self.at = at
        return found

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in NUMBERS:
            raise self.damaged(f"a metadata value has the unknown type {kind}")
        dtype = np.dtype(NUMBERS[kind])
        self.need(count * dtype.itemsize)
        values = np.frombuffer(bytes(self.data[self.at : self.at + count * dtype.itemsize]), dtype)
        self.at += count * dtype.itemsize
        return list(values.tolist())

    def values(self, kind: int, count: int) -> list[Any]:
        return self.strings(count) if kind == STRING else self.numbers(kind, count)

    def value(self, kind: int) -> Any:
        return self.array() if kind == ARRAY else self.values(kind, 1)[0]

    def array(self) -> list[Any]:
        kind = self.number(U32)
        if kind == ARRAY:
            raise self.damaged("a metadata value is an array of arrays, which no model needs")
        count = self.count("array elements", ELEMENT_LIMIT - self.elements)
        self.elements += count
        return self.values(kind, count)

    def entries(self, what: str, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        """`count` times a name and what `read` makes of the bytes behind it."""
        table: dict[str, Any] = {}
        for _ in range(count):
            name = self.string()
            if name in table:
                raise self.damaged(f"the {what} {shown(name)} stands there twice")
            table[name] = read()
        return table

    def tensor(self) -> tuple[Format, tuple[int, ...], int]:
        """Format, shape in torch's order, offset from the start of the data."""
        dims = self.number(U32)
        if not 1 <= dims <= 4:
            raise self.damaged(f"a tensor has {dims} dimensions, expected 1 to 4")
        shape = tuple(self.number(U64) for _ in range(dims))[::-1]
        form = self.format(self.number(U32))
        offset = self.number(U64)
        if 0 in shape:
            raise self.damaged(f"a tensor has the shape {list(shape)}")
        if shape[-1] % form.block:
            raise self.damaged(f"a {form.name} tensor has rows of {shape[-1]} weights, no multiple of {form.block}")
        return form, shape, offset

    def format(self, kind: int) -> Format:
        if kind in FORMAT_OF_TYPE:
            return FORMAT_OF_TYPE[kind]
        supported = ", ".join(GGML)
        raise OffmoeError(
            f"{self.file.path}: tensor format {type_name(kind)} is not supported: supported are {supported}"
        )


def type_name(kind: int) -> str:
    from gguf import GGMLQuantizationType  # only to name what we refuse

    return str(GGMLQuantizationType(kind).name) if kind in list(GGMLQuantizationType) else f"number {kind}"


def check_magic(header: Header) -> None:
    """Raises OffmoeError on what is no little-endian GGUF of version 2 or 3."""
    path, size = header.file.path, header.file.size
    start = header.file.read(0, min(size, 8)).numpy().tobytes()
    if start[:4] != b"GGUF":
        pickled = start[:2] == b"PK" or start[:1] == b"\x80"
        found = "it is a pickle, which is never loaded" if pickled else f"it starts with {start[:4]!r}, not b'GGUF'"
        raise OffmoeError(f"{path} is no GGUF: {found}; give a .gguf file or a directory of safetensors")
    header.at = 4
    version = header.number(U32)
    if version and version & 0xFFFF == 0:
        raise OffmoeError(f"{path} is a big-endian GGUF: only little-endian ones are supported; convert the model anew")
    if version not in (2, 3):
        raise OffmoeError(f"{path} is a GGUF of version {version}: supported are 2 and 3; convert the model anew")


def parse(file: DataFile, number: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata and tensors of one file, which is the checkpoint's file `number`."""
    header = Header(file)
    check_magic(header)
    tensor_count = header.count("tensors", ENTRY_LIMIT)
    key_count = header.count("metadata keys", ENTRY_LIMIT)
    metadata = header.entries("key", key_count, lambda: header.value(header.number(U32)))
    found = header.entries("tensor", tensor_count, header.tensor)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.damaged(f"general.alignment is {shown(alignment)}, no power of two")
    start = -(-header.at // alignment) * alignment
    tensors = {}
    for name, (form, shape, offset) in found.items():
        if offset % alignment:
            raise header.damaged(f"tensor {shown(name)} starts at {offset}, no multiple of {alignment}")
        place = ByteRange(number, start + offset, form.nbytes(prod(shape[:-1]), shape[-1]))
        tensors[name] = TensorInfo(name, form.name, shape, place)
    check_places(file, tensors.values(), start)
    return metadata, tensors


def split_paths(path: Path, count: object) -> list[Path]:
    """The paths of all `count` parts. Raises OffmoeError when some are missing."""
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise OffmoeError(f"{path} is one of {shown(count)} parts: name them as in model-00001-of-00003.gguf")
    paths = [path.with_name(f"{match[1]}-{part:05}-of-{match[3]}.gguf") for part in range(1, int(match[3]) + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        raise OffmoeError(f"{path} is one of {count} parts and misses beside it {some(missing)}: fetch them all")
    return paths


def join(files: list[DataFile]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The first part's metadata, every part's tensors. Raises OffmoeError when they are no set."""
    parts = [parse(file, number) for number, file in enumerate(files)]
    tensors: dict[str, TensorInfo] = {}
    for number, (file, (metadata, found)) in enumerate(zip(files, parts, strict=True)):
        if (metadata.get("split.no"), metadata.get("split.count")) != (number, len(files)):
            raise OffmoeError(f"{file.path} says that it is another part than its name does: fetch it anew")
        if twice := tensors.keys() & found.keys():
            raise OffmoeError(f"{file.path} repeats tensors of another part: {some(map(shown, sorted(twice)))}")
        tensors |= found
    if parts[0][0].get("split.tensors.count", len(tensors)) != len(tensors):
        raise OffmoeError(f"{files[0].path}: its parts hold {len(tensors)} tensors, not as many as it says")
    return parts[0][0], tensors


def open_gguf(path: Path) -> Checkpoint:
    """A .gguf file, or any part of a split one. Raises OffmoeError on whatever is wrong with it."""
    with ExitStack() as stack:
        file = stack.enter_context(DataFile(path))
        metadata, tensors = parse(file, 0)
        files, count = [file], metadata.get("split.count", 0)
        if count not in (0, 1):
            parts = split_paths(path, count)
            files = [file if part == path else stack.enter_context(DataFile(part)) for part in parts]
            metadata, tensors = join(files)
        stack.pop_all()
    return Checkpoint(path, "gguf", files, tensors, metadata)
