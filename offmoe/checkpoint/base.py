"""What a checkpoint offers, whatever its format: tensors by name, read with pread and never mapped."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from offmoe.checkpoint.row_major import ToRowMajor
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import FORMATS, dequantise

JSON_LIMIT = 64 << 20  # the largest tokenizer.json known is 33 MB


@dataclass(frozen=True)
class ByteRange:
    """`nbytes` from `offset` of the checkpoint's file number `file`."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header describes it; `shape` in torch's order, rows of shape[-1] weights."""

    name: str
    format: str  # a key of offmoe.kernels.formats.FORMATS
    shape: tuple[int, ...]
    range: ByteRange
    scales: tuple[ByteRange, ...] = ()  # of a format that lies apart: what comes before `range`
    row_major: ToRowMajor | None = None  # of a tensor whose matrices lie otherwise than `shape` and `format` say

    @property
    def nbytes(self) -> int:
        """In the file."""
        return sum(r.nbytes for r in (*self.scales, self.range))

    @property
    def matrices(self) -> int:
        """It is a stack of so many."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def ranges(self, number: int = 0) -> list[ByteRange]:
        """Where matrix `number` lies: one range, or more where scales lie apart."""
        found = []
        for whole in (*self.scales, self.range):
            nbytes = whole.nbytes // self.matrices
            found.append(ByteRange(whole.file, whole.offset + number * nbytes, nbytes))
        return found


class DataFile:
    """One open file. A map would kill the process when the file shrinks; a pread just comes back short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang
        except OSError as error:
            raise OffmoeError(f"cannot open {path}: {error.strerror}") from error
        status = os.fstat(self.fd)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OffmoeError(f"{path} is no regular file: give a .gguf file or a directory of safetensors")

    def read(self, offset: int, nbytes: int) -> Tensor:
        """Bytes as uint8 [nbytes]. Raises OffmoeError when the file ends early or cannot be read."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        left = data.numpy().data
        while left:
            try:
                done = os.preadv(self.fd, [left], offset + nbytes - len(left))
            except OSError as error:
                raise OffmoeError(f"cannot read {self.path}: {error.strerror}") from error
            if done == 0:
                end = offset + nbytes
                raise OffmoeError(f"{self.path} shrank while in use: it ends before byte {end}; copy it anew")
            left = left[done:]
        return data

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # a later read fails instead of reading another file
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checkpoint:
    """An open checkpoint: every tensor's place, from headers that passed our own bounds checks."""

    def __init__(
        self,
        path: Path,
        kind: Literal["gguf", "safetensors"],
        files: list[DataFile],
        tensors: dict[str, TensorInfo],
        metadata: dict[str, Any],
        parts: dict[str, TensorInfo] | None = None,
    ) -> None:
        self.path = path
        self.kind = kind
        self.files = [file.path for file in files]  # what ByteRange.file indexes
        self.tensors = tensors
        self.parts = parts or {}  # parts of matrices that are several tensors: see models.quantisation
        self.metadata = metadata  # a GGUF's key/values: str, int, float, bool or a list of these
        self._data = files

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object beside the safetensors (config.json, …). None: no such file, or this is a GGUF."""
        path = self.path / name
        return read_json(path) if self.kind == "safetensors" and path.exists() else None

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise OffmoeError(f"{self.path} holds no tensor {name!r}, which its architecture needs")
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """A tensor's bytes in its format, uint8 [nbytes]; scales come first where they lie apart."""
        info = self.info(name)
        if info.row_major:
            return torch.cat([self.matrix(info, number) for number in range(info.matrices)])
        return torch.cat([self.read_range(r) for r in (*info.scales, info.range)])

    def matrix(self, info: TensorInfo, number: int) -> Tensor:
        """The bytes of one matrix of a tensor in its format, uint8 [nbytes]."""
        raw = torch.cat([self.read_range(r) for r in info.ranges(number)])
        return torch.from_numpy(info.row_major(raw.numpy(), info.name)) if info.row_major else raw

    def read_range(self, r: ByteRange) -> Tensor:
        """uint8 [nbytes]. Safe from several threads. Raises OffmoeError on a short read."""
        return self._data[r.file].read(r.offset, r.nbytes)

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor's values, dequantised, in its own shape."""
        info = self.info(name)
        *rows, cols = info.shape or (1,)
        return dequantise(self.read(name), info.format, math.prod(rows), cols, dtype).reshape(info.shape)

    def rows(self, info: TensorInfo, first: int, count: int) -> Tensor:
        """Rows first … first + count of a tensor of shape [..., cols], dequantised: float32 [count, cols]."""
        form, cols = FORMATS[info.format], info.shape[-1]
        if info.row_major:
            high = info.shape[-2]
            whole = dequantise(self.matrix(info, first // high), form, high, cols)
            return whole[first % high : first % high + count]
        if form.scales and form.tiled:
            return self._tiled_rows(info, form.scales.rows, first, count)
        raw = []
        for r, line in zip((*info.scales, info.range), form.lines(cols), strict=True):
            raw.append(self.read_range(ByteRange(r.file, r.offset + first * line, count * line)))
        return dequantise(torch.cat(raw), form, count, cols)

    def _tiled_rows(self, info: TensorInfo, tile: int, first: int, count: int) -> Tensor:
        """The same where so many rows share scales: whole tiles are read."""
        form, (rows, cols) = FORMATS[info.format], info.shape[-2:]
        scales, code = info.ranges(first // rows)
        first %= rows
        line = form.scales_nbytes(1, cols)
        start, end = first // tile * tile, min(rows, -(-(first + count) // tile) * tile)
        above = ByteRange(scales.file, scales.offset + start // tile * line, -(-(end - start) // tile) * line)
        codes = ByteRange(code.file, code.offset + start * cols, (end - start) * cols)
        values = dequantise(torch.cat((self.read_range(above), self.read_range(codes))), form, end - start, cols)
        return values[first - start : first - start + count]

    def close(self) -> None:
        for file in self._data:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shown(text: object) -> str:
    """Something out of a file, safe to put into a one-line error."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:76]}…{quoted[-1]}"


def some(names: Iterable[object], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    every = [str(name) for name in names]
    return ", ".join(every[:limit]) + (f" and {len(every) - limit} more" if len(every) > limit else "")


def check_places(file: DataFile, tensors: Iterable[TensorInfo], start: int) -> None:
    """Raises OffmoeError where tensors leave [start, end of the file) or lie on each other."""
    end, before = start, ""
    for info in sorted(tensors, key=lambda info: (info.range.offset, info.range.nbytes)):
        place = info.range
        if place.offset + place.nbytes > file.size:
            raise OffmoeError(
                f"{file.path} is truncated or damaged: tensor {shown(info.name)} ends at byte "
                f"{place.offset + place.nbytes} and the file at {file.size}; copy it anew"
            )
        if place.offset < end:
            raise OffmoeError(f"{file.path} is damaged: tensors {shown(before)} and {shown(info.name)} overlap")
        end, before = place.offset + place.nbytes, info.name


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises OffmoeError on anything else."""
    with DataFile(path) as file:
        if file.size > JSON_LIMIT:
            raise OffmoeError(f"{path} has {file.size} bytes: at most {JSON_LIMIT} are read")
        return parse_json(path, file.read(0, file.size).numpy().tobytes())


def parse_json(path: Path, text: bytes, what: str = "") -> dict[str, Any]:
    """One JSON object, no key twice in it. `what` names the part of the file that `text` is."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise OffmoeError(f"{path}: {what}no valid JSON: {str(error)[:100]}") from error
    if not isinstance(value, dict):
        raise OffmoeError(f"{path}: {what}expected a JSON object, found {type(value).__name__}")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(max(keys, key=keys.count))} stands twice")
    return table
