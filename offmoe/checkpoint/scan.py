"""Every byte of a weights file, read once: values that are no numbers, runs of zeros, checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offmoe.checkpoint.base import DataFile, TensorInfo

PIECE = 8 << 20  # bytes read at once
GRAIN = 512  # bytes that are looked at together for zeros
HOLE = 1024  # the shortest run of zeros that is told
Bytes = NDArray[np.uint8]

FLOATS = {  # bits of an exponent that is all ones: NaN or infinity
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF << 52),
    "F8_E5M2": (np.uint8, 0x7C),
}
SCALES = {  # bytes of a GGUF block, and where its 16-bit scales are
    "Q4_0": (18, (0,)),
    "Q4_1": (20, (0, 2)),
    "Q5_0": (22, (0,)),
    "Q5_1": (24, (0, 2)),
    "Q8_0": (34, (0,)),
    "Q8_1": (40, (0, 2)),
    "Q2_K": (84, (80, 82)),
    "Q3_K": (110, (108,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
    "IQ4_NL": (18, (0,)),
    "IQ4_XS": (136, (0,)),
    "IQ2_XXS": (66, (0,)),
    "IQ2_XS": (74, (0,)),
    "IQ2_S": (82, (0,)),
    "IQ3_XXS": (98, (0,)),
    "IQ3_S": (110, (0,)),
    "IQ1_S": (50, (0,)),
    "TQ1_0": (54, (52,)),
    "TQ2_0": (66, (64,)),
}
EXPONENTS = {"MXFP4": (17, 0), "F8_E8M0": (1, 0)}  # bytes of a block, and where its 8-bit exponent is: 255 is NaN


def not_numbers(data: Bytes, fmt: str) -> int:
    """Return how many values, or scales of blocks, are NaN or infinite. `data` is whole blocks of the format `fmt`."""
    if fmt in FLOATS:
        kind, mask = FLOATS[fmt]
        return int(np.count_nonzero((data.view(kind) & kind(mask)) == mask))
    if fmt == "F8_E4M3":
        return int(np.count_nonzero((data & 0x7F) == 0x7F))
    if fmt in EXPONENTS:
        block, at = EXPONENTS[fmt]
        return int(np.count_nonzero(data.reshape(-1, block)[:, at] == 255))
    if fmt not in SCALES:
        return 0
    block, places = SCALES[fmt]
    blocks = data.reshape(-1, block)
    scales = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.uint16) for at in places]
    return sum(int(np.count_nonzero((scale & 0x7C00) == 0x7C00)) for scale in scales)


def block_bytes(fmt: str) -> int:
    """Return the bytes of a format's block, of which pieces are made."""
    if fmt in FLOATS:
        return np.dtype(FLOATS[fmt][0]).itemsize
    return (SCALES.get(fmt) or EXPONENTS.get(fmt) or (1, 0))[0]


def zero_runs(data: Bytes) -> list[tuple[int, int]]:
    """Return runs of zeros (first byte, end): those of at least 2 · GRAIN bytes, and any at both ends of `data`."""
    nbytes = len(data)
    whole = nbytes // GRAIN
    zero = ~data[: whole * GRAIN].reshape(whole, GRAIN).any(axis=1) if whole else np.zeros(0, bool)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], zero.view(np.int8), [0]))))
    runs = []
    for first, last in zip(edges[::2] * GRAIN, edges[1::2] * GRAIN, strict=True):
        before, after = data[max(0, first - GRAIN) : first], data[last : last + GRAIN]
        runs.append((int(first) - leading_zeros(before[::-1]), int(last) + leading_zeros(after)))
    head, tail = leading_zeros(data[:GRAIN]), leading_zeros(data[-GRAIN:][::-1])
    if head and (not runs or runs[0][0] > 0):
        runs.insert(0, (0, head))
    if tail and (not runs or runs[-1][1] < nbytes):
        runs.append((nbytes - tail, nbytes))
    return runs


def leading_zeros(data: Bytes) -> int:
    """Return how many bytes at the beginning of `data` are zero."""
    other = np.flatnonzero(data)
    return int(other[0]) if len(other) else len(data)


@dataclass
class TensorScan:
    """Findings in one tensor, as its bytes are read in pieces."""

    info: TensorInfo
    not_numbers: int = 0
    zeros: list[tuple[int, int]] = field(default_factory=list)  # in the tensor
    done: int = 0

    def add(self, data: Bytes) -> None:
        """Look at the next bytes of the tensor."""
        self.not_numbers += not_numbers(data, self.info.format)
        for first, end in zero_runs(data):
            first, end = first + self.done, end + self.done
            if self.zeros and self.zeros[-1][1] == first:
                self.zeros[-1] = (self.zeros[-1][0], end)
            else:
                self.zeros.append((first, end))
        self.done += len(data)
        self.zeros = [run for run in self.zeros if run[1] - run[0] >= HOLE or run[1] == self.done]

    def holes(self) -> list[tuple[int, int]]:
        """Return the runs of zeros, in the tensor, once all of it was looked at."""
        return [run for run in self.zeros if run[1] - run[0] >= HOLE]


def scan_file(
    file: DataFile, tensors: list[TensorInfo], digest: str, progress: Callable[[int], None]
) -> tuple[list[TensorScan], bool]:
    """Read a file once. Return what was found in its tensors, and whether its SHA-256 is `digest` ("": not checked)."""
    sha, scans = hashlib.sha256(), []
    for offset, nbytes, info in segments(file, tensors, bool(digest)):
        scan = TensorScan(info) if info else None
        step = PIECE // block_bytes(info.format) * block_bytes(info.format) if info else PIECE
        for at in range(0, nbytes, step):
            piece = file.read(offset + at, min(step, nbytes - at)).numpy()
            if digest:
                sha.update(piece.data)
            if scan:
                scan.add(piece)
            progress(len(piece))
        scans += [scan] if scan else []
    return scans, not digest or sha.hexdigest() == digest


def segments(file: DataFile, tensors: list[TensorInfo], gaps: bool) -> Iterator[tuple[int, int, TensorInfo | None]]:
    """Yield offset, bytes and tensor of each part of a file in order, with `gaps` also of what lies between tensors."""
    at = 0
    for info in sorted(tensors, key=lambda info: info.range.offset):
        if gaps and info.range.offset > at:
            yield at, info.range.offset - at, None
        yield info.range.offset, info.range.nbytes, info
        at = info.range.offset + info.range.nbytes
    if gaps and file.size > at:
        yield at, file.size - at, None


def expected_digest(path: Path) -> str:
    """Return the SHA-256 that a file should have: by its name in a cache, the hub's note of it, or a file of sums."""
    for name in (path.name, path.resolve().name):  # a blob of ollama's or of the hub's cache
        if match := re.fullmatch(r"(?:sha256[-:])?([0-9a-f]{64})", name):
            return match[1]
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"  # of hf download --local-dir
    own = [note, *(path.with_name(path.name + ending) for ending in (".sha256", ".sha256sum"))]
    shared = [path.with_name(name) for name in ("SHA256SUMS", "sha256sum.txt", "checksums.txt")]
    lines = [line for file in own for line in short_lines(file)]
    lines += [
        line for file in shared for line in short_lines(file) if line.split()[-1:] in ([path.name], ["*" + path.name])
    ]
    return next((match[0] for line in lines if (match := re.search(r"\b[0-9a-f]{64}\b", line))), "")


def short_lines(file: Path) -> list[str]:
    """Return the lines of a small text file, none if there is no such file."""
    try:
        return file.read_text(errors="replace").splitlines() if file.stat().st_size < 1 << 20 else []
    except OSError:
        return []
