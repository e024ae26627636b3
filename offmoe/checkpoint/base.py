"""Common interface of checkpoints in all file formats: tensors by name, read with pread and never memory-mapped."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from offmoe.checkpoint.file_names import join_names as join_names
from offmoe.checkpoint.first_bytes import PEEK, found_instead, unfinished
from offmoe.checkpoint.row_major import ToRowMajor
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import FORMATS, dequantise

EMPTY = "is empty: expected weights; copy the model again"  # refusal of a tensor without elements
BOM = b"\xef\xbb\xbf"  # the byte order mark that some editors write before UTF-8
NUMBERS_AND_NAMES = ("config.json", "generation_config.json", "adapter_config.json", "model_index.json")
JSON_LIMIT = 64 << 20  # the largest tokenizer.json known is 33 MB


@dataclass(frozen=True)
class ByteRange:
    """`nbytes` bytes from `offset` of the checkpoint's file number `file`."""

    file: int
    offset: int
    nbytes: int
    shared: bool = False  # they belong to every matrix of a stack, not a part to each


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header describes it. `shape` is in torch's order: rows of shape[-1] weights.

    A checkpoint may hold tensors that no model here computes with: buffers, a vision tower, parts of quantised
    matrices. Such a tensor is kept with the file's own name of its type, and with the `refusal` that a role raises
    which needs it.
    """

    name: str
    format: str  # a key of offmoe.kernels.formats.FORMATS, unless there is a refusal
    shape: tuple[int, ...]
    range: ByteRange
    scales: tuple[ByteRange, ...] = ()  # scales stored separately; in the format they precede `range`
    row_major: ToRowMajor | None = None  # conversion, if the file's layout is not that of `shape` and `format`
    refusal: str = ""  # why no role can use the tensor: "has dtype …", or the whole error of a quantised matrix

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(r.nbytes for r in (*self.scales, self.range))

    @property
    def matrices(self) -> int:
        """Number of matrices stacked in the tensor."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def ranges(self, number: int = 0) -> list[ByteRange]:
        """Return the byte ranges of matrix `number`: one, or more if scales are stored separately."""
        found = []
        for whole in (*self.scales, self.range):
            if whole.shared:
                found.append(whole)
                continue
            nbytes = whole.nbytes // self.matrices
            found.append(ByteRange(whole.file, whole.offset + number * nbytes, nbytes))
        return found


class DataFile:
    """An open file, read with pread: a memory map would crash the process if the file shrinks, a pread returns less."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
        except OSError as error:
            lost = isinstance(error, FileNotFoundError) and path.is_symlink()
            reason = f"it is a link to {os.readlink(path)}, which is not there; download it again"
            raise OffmoeError(f"cannot open {path}: {reason if lost else error.strerror}") from error
        status = os.fstat(self.fd)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OffmoeError(f"{path} is not a regular file: give a .gguf file or a directory of safetensors")

    def read(self, offset: int, nbytes: int) -> Tensor:
        """Return bytes as uint8 [nbytes]. Raises OffmoeError if the file ends early or cannot be read."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        left = data.numpy().data
        while left:
            try:
                done = os.preadv(self.fd, [left], offset + nbytes - len(left))
            except OSError as error:
                raise OffmoeError(f"cannot read {self.path}: {error.strerror}") from error
            if done == 0:
                end = offset + nbytes
                raise OffmoeError(f"{self.path} shrank while in use: it ends before byte {end}; copy it again")
            left = left[done:]
        return data

    def close(self) -> None:
        """Close the file; later reads fail."""
        fd, self.fd = self.fd, -1  # so that a later read fails, rather than read another file
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checkpoint:
    """An open checkpoint: the location of every tensor, from validated headers."""

    def __init__(
        self,
        path: Path,
        kind: Literal["gguf", "safetensors"],
        files: list[DataFile],
        tensors: dict[str, TensorInfo],
        metadata: dict[str, Any],
    ) -> None:
        self.path = path
        self.kind = kind
        self.files = [file.path for file in files]  # indexed by ByteRange.file
        self.tensors = tensors
        self.metadata = metadata  # key/value pairs of a GGUF: str, int, float, bool or a list of one of these types
        self._data = files

    def json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object stored next to the safetensors (config.json, …), or None if there is no such file."""
        path = self.path / name
        return read_json(path) if self.kind == "safetensors" and path.exists() else None

    def info(self, name: str) -> TensorInfo:
        """Return the description of a tensor. Raises OffmoeError if there is none, or offmoe cannot compute with it."""
        if name not in self.tensors:
            raise OffmoeError(f"{self.path} has no tensor {name!r}, which its architecture needs: copy the model again")
        self.check_usable(self.tensors[name])
        return self.tensors[name]

    def check_usable(self, info: TensorInfo) -> None:
        """Raise OffmoeError if offmoe cannot compute with a tensor."""
        if info.refusal:
            raise OffmoeError(f"{self.path}: tensor {quote(info.name)} {info.refusal}")

    def read(self, name: str) -> Tensor:
        """Return a tensor's bytes in its format, uint8 [nbytes]; scales that are stored separately come first."""
        info = self.info(name)
        if info.row_major:
            return torch.cat([self.matrix(info, number) for number in range(info.matrices)])
        return torch.cat([self.read_range(r) for r in (*info.scales, info.range)])

    def matrix(self, info: TensorInfo, number: int) -> Tensor:
        """Return the bytes of one matrix of a tensor in its format, uint8 [nbytes]."""
        raw = torch.cat([self.read_range(r) for r in info.ranges(number)])
        return torch.from_numpy(info.row_major(raw.numpy(), info.name)) if info.row_major else raw

    def read_range(self, r: ByteRange) -> Tensor:
        """Return the bytes of a range, uint8 [nbytes]. Thread-safe. Raises OffmoeError on a short read."""
        return self._data[r.file].read(r.offset, r.nbytes)

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor's values, dequantised, in its own shape."""
        info = self.info(name)
        *rows, cols = info.shape or (1,)
        return dequantise(self.read(name), info.format, math.prod(rows), cols, dtype).reshape(info.shape)

    def rows(self, info: TensorInfo, first: int, count: int) -> Tensor:
        """Return rows first … first + count of a tensor of shape [..., cols], dequantised: float32 [count, cols]."""
        fmt, cols = FORMATS[info.format], info.shape[-1]
        if info.row_major:
            rows = info.shape[-2]
            matrix = dequantise(self.matrix(info, first // rows), fmt, rows, cols)
            return matrix[first % rows : first % rows + count]
        if fmt.scales and fmt.tiled:
            return self._tiled_rows(info, fmt.scales.rows, first, count)
        raw = []
        for r, line in zip((*info.scales, info.range), fmt.lines(cols), strict=True):
            raw.append(self.read_range(ByteRange(r.file, r.offset + first * line, count * line)))
        return dequantise(torch.cat(raw), fmt, count, cols)

    def _tiled_rows(self, info: TensorInfo, tile: int, first: int, count: int) -> Tensor:
        """Return rows of a format in which `tile` rows share scales, by reading whole tiles."""
        fmt, (rows, cols) = FORMATS[info.format], info.shape[-2:]
        scales, code = info.ranges(first // rows)
        first %= rows
        line = fmt.scales_nbytes(1, cols)
        start, end = first // tile * tile, min(rows, -(-(first + count) // tile) * tile)
        tile_scales = ByteRange(scales.file, scales.offset + start // tile * line, -(-(end - start) // tile) * line)
        codes = ByteRange(code.file, code.offset + start * cols, (end - start) * cols)
        values = dequantise(torch.cat((self.read_range(tile_scales), self.read_range(codes))), fmt, end - start, cols)
        return values[first - start : first - start + count]

    def close(self) -> None:
        for file in self._data:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def quote(text: object) -> str:
    """Return a short repr of something read from a file, safe to put into a one-line error."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:76]}…{quoted[-1]}"


def check_ranges(file: DataFile, tensors: Iterable[TensorInfo], start: int) -> None:
    """Raise OffmoeError if a tensor reaches outside [start, end of the file) or two tensors overlap."""
    end, previous = start, ""
    for info in sorted(tensors, key=lambda info: (info.range.offset, info.range.nbytes)):
        extent = info.range
        if extent.offset + extent.nbytes > file.size:
            raise OffmoeError(
                f"{file.path} is truncated or damaged: tensor {quote(info.name)} ends at byte "
                f"{extent.offset + extent.nbytes} and the file at {file.size}; copy it again"
            )
        if extent.offset < end:
            raise OffmoeError(f"{file.path} is damaged: tensors {quote(previous)} and {quote(info.name)} overlap")
        end, previous = extent.offset + extent.nbytes, info.name


@contextmanager
def explaining(file: DataFile) -> Iterator[None]:
    """Add to an error about a file what its name, or a file next to it, says: that its download is not finished."""
    try:
        yield
    except OffmoeError as error:
        cause = unfinished(file.path.name, listed(file.path.parent))
        raise OffmoeError(f"{error}; {cause}") if cause else error from error.__cause__


def listed(folder: Path) -> list[str]:
    """Return the names in a folder, none if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises OffmoeError on anything else."""
    with DataFile(path) as file:
        if file.size > JSON_LIMIT:
            raise OffmoeError(f"{path} has {file.size} bytes: expected a JSON file of at most {JSON_LIMIT}")
        text = file.read(0, file.size).numpy().tobytes().removeprefix(BOM)
    is_json = text.lstrip()[:1] in (b"{", b"[")
    value = parse_json(path, text, lenient=path.name in NUMBERS_AND_NAMES) if is_json else {}
    instead = found_instead(text[:PEEK], len(text)) if not is_json or value.keys() & {"error", "detail"} else ""
    if instead:
        raise OffmoeError(f"{path}: not valid JSON: {instead}")
    return value if is_json else parse_json(path, text)


def parse_json(path: Path, text: bytes, what: str = "", lenient: bool = False) -> dict[str, Any]:
    """Parse one JSON object without duplicate keys. `what` names the part of the file that `text` is, in errors.

    If `lenient`, U+FFFD stands for bytes that are not UTF-8: what has to be right is a number, or a name that is known.
    """
    try:
        decoded = text.decode(errors="replace" if lenient else "strict")
        value = json.loads(decoded, object_pairs_hook=reject_duplicate_keys)
        value = without_surrogates(value) if "\\ud" in decoded.lower() else value
    except (ValueError, RecursionError) as error:
        raise OffmoeError(f"{path}: {what}not valid JSON: {str(error)[:100]}") from error
    if not isinstance(value, dict):
        raise OffmoeError(f"{path}: {what}expected a JSON object, found {type(value).__name__}")
    return value


def without_surrogates(value: Any) -> Any:
    """Return a JSON value with U+FFFD for the halves of surrogate pairs, which no text can hold."""
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(member) for key, member in value.items()}
    if isinstance(value, list):
        return [without_surrogates(member) for member in value]
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict. Raises ValueError if a key appears twice with different values."""
    table = dict(pairs)
    if len(table) != len(pairs) and (clash := [key for key, value in pairs if table[key] != value]):
        raise ValueError(f"the key {quote(clash[0])} appears twice")
    return table
