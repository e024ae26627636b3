"""GGUF files: tensors and metadata of one file, or of all parts of a split one."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
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
    quote,
)
from offmoe.checkpoint.file_names import SPLIT_NAME
from offmoe.checkpoint.first_bytes import PEEK
from offmoe.checkpoint.gguf_header import ENTRY_LIMIT, Header, check_magic
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import GGML

FORMAT_OF_TYPE = {fmt.gguf_type: fmt for fmt in GGML.values()}


@cache
def type_name(kind: int) -> str:
    """Return ggml's name of a tensor type, for errors."""
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(kind).name) if kind in list(GGMLQuantizationType) else f"number {kind}"


Parsed = tuple[dict[str, Any], dict[str, TensorInfo]]


def parse(file: DataFile, number: int) -> Parsed:
    """Return the metadata and the tensors of one file, which is the checkpoint's file `number`."""
    with explaining(file):
        return parse_header(file, number)


def parse_header(file: DataFile, number: int) -> Parsed:
    """Parse and check the header."""
    header = Header(file)
    check_magic(header)
    tensor_count = header.count("tensors", ENTRY_LIMIT)
    key_count = header.count("metadata keys", ENTRY_LIMIT)
    metadata = header.metadata(key_count)
    found = header.tensors(tensor_count)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.damaged(f"general.alignment is {quote(alignment)}, not a power of two")
    start = -(-header.offset // alignment) * alignment
    offsets = sorted({offset for _, _, offset in found.values()})
    ends = dict(zip(offsets, [*offsets[1:], file.size - start], strict=False))  # at most: where the next one begins
    tensors = {}
    for name, (kind, shape, offset) in found.items():
        if offset % alignment:
            raise header.damaged(f"tensor {quote(name)} starts at {offset}, not a multiple of {alignment}")
        fmt, cols, refusal = FORMAT_OF_TYPE.get(kind), shape[-1] if shape else 1, refusal_of(kind, shape)
        nbytes = fmt.nbytes(prod(shape[:-1]), cols) if fmt and not refusal else max(0, ends[offset] - offset)
        extent = ByteRange(number, start + offset, nbytes)
        tensors[name] = TensorInfo(name, fmt.name if fmt else type_name(kind), shape, extent, refusal=refusal)
    check_ranges(file, tensors.values(), start)
    return metadata, tensors


def refusal_of(kind: int, shape: tuple[int, ...]) -> str:
    """Return why no role can use a tensor of that ggml type and shape, or an empty string."""
    fmt, cols = FORMAT_OF_TYPE.get(kind), shape[-1] if shape else 1
    if fmt is None:
        return f"has the format {type_name(kind)}: expected one of {', '.join(GGML)}"
    if cols % fmt.block:
        return f"is {fmt.name} and has rows of {cols} weights: expected a multiple of {fmt.block}; copy the model again"
    return EMPTY if 0 in shape else ""


def check_not_joined(file: DataFile, tensors: dict[str, TensorInfo]) -> None:
    """Raise OffmoeError if another GGUF follows the tensors of a part: `cat` does not join the parts of a split one."""
    end = max((info.range.offset + info.nbytes for info in tensors.values()), default=0)
    tail = file.read(end, min(file.size - end, PEEK)).numpy().tobytes()
    if end and b"GGUF" in tail:
        raise OffmoeError(
            f"{file.path} is made of the parts of a split GGUF, joined as by cat, which makes no GGUF: give the parts "
            "as they were (any one of them, all in one directory), or join them with llama-gguf-split --merge"
        )


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


def merge_parts(files: list[DataFile]) -> Parsed:
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
            check_not_joined(file, tensors)
            parts = split_paths(path, count)
            files = [file if part == path else stack.enter_context(DataFile(part)) for part in parts]
            metadata, tensors = merge_parts(files)
        stack.pop_all()
    return Checkpoint(path, "gguf", files, tensors, metadata)
