"""Directories of safetensors: headers and the index, parsed and bounds-checked."""

from __future__ import annotations

import struct
from collections.abc import Mapping
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
    explaining,
    join_names,
    listed,
    parse_json,
    quote,
    read_json,
)
from offmoe.checkpoint.file_names import ADAPTER, CONSOLIDATED, INDEX, SHARD_NAME, SINGLE
from offmoe.checkpoint.first_bytes import PEEK, found_instead, starts_safetensors
from offmoe.errors import OffmoeError

HEADER_LIMIT = 16 << 20  # bytes, about 100,000 tensors in one file; as Python objects 10 times as much
FLOATS = ("F32", "F16", "BF16")  # what a tensor alone may be; the others only hold parts of quantised matrices
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
        "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}  # fmt: skip
MOST_DIMENSIONS = 64  # torch's own limit


def parse(file: DataFile, number: int) -> dict[str, TensorInfo]:
    """Return the tensors of one file, which is the checkpoint's file `number`."""
    with explaining(file):
        return parse_header(file, number)


def parse_header(file: DataFile, number: int) -> dict[str, TensorInfo]:
    """Parse and check the header."""
    first = file.read(0, min(file.size, PEEK)).numpy().tobytes()
    if not starts_safetensors(first, file.size) and (instead := found_instead(first, file.size)):
        raise OffmoeError(f"{file.path} is not a safetensors file: {instead}")
    if file.size < 8:
        raise OffmoeError(f"{file.path} is truncated: it has {file.size} bytes; copy it again")
    (length,) = struct.unpack_from("<Q", first)
    if length > min(file.size - 8, HEADER_LIMIT):
        raise OffmoeError(
            f"{file.path} is truncated or not a safetensors file: it claims a header of {length} bytes, "
            f"the file has {file.size} and the limit is {HEADER_LIMIT}"
        )
    header = parse_json(file.path, file.read(8, length).numpy().tobytes(), "its header: ", lenient=True)
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


def model_files(directory: Path) -> dict[str, list[str] | None]:
    """Return the file names of the model in a directory, each with the tensors expected in it (None: all there are).

    Empty if there are no safetensors of a model. Raises OffmoeError if some are missing.
    """
    names = listed(directory)
    if SINGLE in names:  # as in transformers, it takes precedence over an index
        return {SINGLE: None}
    if INDEX in names:
        return {**shards(directory)}
    models = [
        name for name in names if name.lower().endswith(".safetensors") and not name.startswith((ADAPTER, CONSOLIDATED))
    ]
    sets = {SHARD_NAME.sub(r"\1-of-\3", name) for name in models if SHARD_NAME.fullmatch(name)}
    if len(sets) > 1:
        raise OffmoeError(f"{directory} has shards of several models and no {INDEX}: give a shard of one of them")
    if sets:
        return shard_set(directory, next(name for name in models if SHARD_NAME.fullmatch(name)))
    return dict.fromkeys(models)


def files_with(directory: Path, name: str) -> dict[str, list[str] | None]:
    """Return the file names of the model that the file `name` is a part of."""
    whole = model_files(directory)
    return whole if name in whole else shard_set(directory, name)


def shard_set(directory: Path, name: str) -> dict[str, list[str] | None]:
    """Return the file names of all shards that belong to `name`, by their numbers.

    Raises OffmoeError if some are missing.
    """
    match = SHARD_NAME.fullmatch(name)
    if match is None:
        return {name: None}
    stem, number, count = match.groups()
    names = [f"{stem}-{shard:0{len(number)}}-of-{count}.safetensors" for shard in range(1, int(count) + 1)]
    check_present(directory, names)
    return dict.fromkeys(names)


def check_present(directory: Path, names: list[str]) -> None:
    """Raise OffmoeError unless all shards are there."""
    if missing := [name for name in names if not (directory / name).exists()]:
        raise OffmoeError(
            f"{directory} lacks {len(missing)} of {len(names)} shards: {join_names(map(quote, missing))}; download them"
        )


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
    check_present(directory, sorted(names))
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


def open_safetensors(directory: Path, names: Mapping[str, list[str] | None]) -> Checkpoint:
    """Open the files `names` of a directory, each with the tensors expected in it (None: all there are).

    Raises OffmoeError if anything is wrong with them.
    """
    tensors: dict[str, TensorInfo] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(DataFile(directory / name)) for name in names]
        for number, (file, expected) in enumerate(zip(files, names.values(), strict=True)):
            found = open_shard(file, number, expected)
            if twice := sorted(tensors.keys() & found.keys()):
                raise OffmoeError(
                    f"{directory} has no index, and {file.path.name} has the same tensors as another file "
                    f"({join_names(map(quote, twice), 2)}): give one of {join_names(names)}"
                )
            tensors |= found
        stack.pop_all()
    return Checkpoint(directory, "safetensors", files, tensors, {})
