"""Directories of safetensors: headers and the index, parsed and bounds-checked."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

from offmoe.checkpoint.base import (
    EMPTY,
    ByteRange,
    Checkpoint,
    DataFile,
    TensorInfo,
    check_ranges,
    join_names,
    parse_json,
    quote,
    read_json,
)
from offmoe.errors import OffmoeError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 16 << 20  # bytes, about 100,000 tensors in one file; as Python objects 10 times as much
FLOATS = ("F32", "F16", "BF16")  # what a tensor alone may be; the others only hold parts of quantised matrices
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
        "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}  # fmt: skip
MOST_DIMENSIONS = 64  # torch's own limit


def parse(file: DataFile, number: int) -> dict[str, TensorInfo]:
    """Return the tensors of one file, which is the checkpoint's file `number`."""
    if file.size < 8:
        raise OffmoeError(f"{file.path} is truncated: it has {file.size} bytes; copy it again")
    (length,) = struct.unpack("<Q", file.read(0, 8).numpy().tobytes())
    if length > min(file.size - 8, HEADER_LIMIT):
        raise OffmoeError(
            f"{file.path} is truncated or not a safetensors file: it claims a header of {length} bytes, "
            f"the file has {file.size} and the limit is {HEADER_LIMIT}"
        )
    header = parse_json(file.path, file.read(8, length).numpy().tobytes(), "its header: ")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: tensor(file, name, entry, ByteRange(number, start, 0)) for name, entry in header.items()}
    check_ranges(file, tensors.values(), start)
    return tensors


def tensor(file: DataFile, name: str, entry: Any, data: ByteRange) -> TensorInfo:
    """Validate one entry of a header. `data` is the start of the data section."""

    def damaged(reason: str) -> OffmoeError:
        return OffmoeError(f"{file.path} is damaged: tensor {quote(name)} {reason}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(f"is described by {quote(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise damaged(f"has the dtype {quote(dtype)}, expected a name")
    if not is_natural_list(shape) or len(shape) > MOST_DIMENSIONS:
        raise damaged(f"has the shape {quote(shape)}, expected up to {MOST_DIMENSIONS} numbers of at least 0")
    if not is_natural_list(offsets) or len(offsets) != 2:
        raise damaged(f"has the data_offsets {quote(offsets)}, expected two")
    begin, end = offsets
    nbytes = end - begin
    expected = -(-prod(shape) * BITS[dtype] // 8) if dtype in BITS else max(0, nbytes)
    if nbytes != expected:
        raise damaged(f"takes {nbytes} bytes at its data_offsets, and {expected} by its dtype and shape")
    refusal = refusal_of(dtype) if dtype not in FLOATS else EMPTY if nbytes == 0 else ""
    return TensorInfo(name, dtype, tuple(shape), ByteRange(data.file, data.offset + begin, nbytes), refusal=refusal)


def refusal_of(dtype: str) -> str:
    """Return why a tensor of `dtype` cannot be used alone."""
    return f"has dtype {quote(dtype)}: expected {', '.join(FLOATS)}, or the types of a supported quantisation"


def is_natural_list(value: object) -> bool:
    """Return whether `value` is a list of integers of at least 0."""
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0


def shards(directory: Path) -> dict[str, list[str]]:
    """Return the file names of a sharded checkpoint, each with the tensors that the index expects in it."""
    path = directory / INDEX
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise OffmoeError(f"{path} has no weight_map: expected a map from tensor names to file names")
    names: dict[str, list[str]] = {}
    for name, shard in weights.items():
        if not isinstance(shard, str):
            raise bad_shard_name(path, shard)
        names.setdefault(shard, []).append(name)
    for shard in names:
        if not shard.endswith(".safetensors") or {"/", "\\", "\0"} & set(shard):
            raise bad_shard_name(path, shard)
    missing = sorted(shard for shard in names if not (directory / shard).exists())
    if missing:
        raise OffmoeError(
            f"{directory} lacks {len(missing)} of {len(names)} shards: {join_names(map(quote, missing))}; download them"
        )
    return names


def bad_shard_name(index: Path, shard: object) -> OffmoeError:
    """Return the error for an index entry that is not the name of a shard."""
    return OffmoeError(f"{index} points to {quote(shard)}: expected a .safetensors file in the same directory")


def open_shard(file: DataFile, number: int, expected: list[str] | None) -> dict[str, TensorInfo]:
    """Return the tensors of a shard: the expected ones, or all if `expected` is None."""
    found = parse(file, number)
    if expected is None:
        return found
    if absent := [name for name in expected if name not in found]:
        raise OffmoeError(f"{file.path} lacks tensors that {INDEX} lists in it: {join_names(map(quote, absent))}")
    return {name: found[name] for name in expected}


def open_safetensors(directory: Path) -> Checkpoint:
    """Open a directory with model.safetensors or a sharded index. Raises OffmoeError if anything is wrong with it."""
    single = (directory / SINGLE).exists()  # as in transformers, it takes precedence over an index
    names: dict[str, list[str] | None] = {SINGLE: None} if single else {**shards(directory)}
    tensors: dict[str, TensorInfo] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(DataFile(directory / name)) for name in names]
        for number, (file, expected) in enumerate(zip(files, names.values(), strict=True)):
            tensors |= open_shard(file, number, expected)
        stack.pop_all()
    return Checkpoint(directory, "safetensors", files, tensors, {})
