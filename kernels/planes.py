"""Layout of a record in a slot: blocks that a GPU cannot read in 16-byte words are split into planes.

A block of Q4_0 is a 2-byte scale and 16 bytes of nibbles: in a slot all scales of a matrix come first, then all
nibbles, both aligned. Formats whose blocks are aligned keep the file's layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from offmoe.kernels.formats import FORMATS, together
from offmoe.kernels.record import RecordLayout

ALIGN = 16
# The byte runs of a block, in the order of the file; a single run stays as it is.
PLANES: dict[str, tuple[int, ...]] = {
    "F32": (4,),
    "F16": (2,),
    "BF16": (2,),
    "Q8_0": (2, 32),
    "Q4_0": (2, 16),
    "Q4_1": (2, 2, 16),
    "Q5_0": (2, 4, 16),
    "Q5_1": (2, 2, 4, 16),
    "Q2_K": (16, 64, 4),
    "Q3_K": (32, 64, 12, 2),
    "Q4_K": (144,),
    "Q5_K": (176,),
    "Q6_K": (128, 64, 16, 2),
    "IQ1_S": (2, 32, 16),
    "IQ1_M": (32, 16, 8),
    "IQ2_XXS": (2, 64),
    "IQ2_XS": (2, 64, 8),
    "IQ2_S": (2, 32, 32, 16),
    "IQ3_XXS": (2, 64, 32),
    "IQ3_S": (2, 64, 40, 4),
    "IQ4_NL": (2, 16),
    "IQ4_XS": (8, 128),
    "MXFP4": (1, 16),
    "F8_E4M3": (128,),  # behind the plane of the scales
    "F8_E4M3_BF16": (128,),
    "F8_E4M3_ROW": (32,),
    **{name: form.apart for name, form in FORMATS.items() if form.apart},
}


@dataclass(frozen=True)
class Matrix:
    """Matrix [rows, cols] in `format`; `planes`: the byte at which each of its planes starts in a slot or buffer."""

    format: str
    rows: int
    cols: int
    planes: tuple[int, ...]
    pitch: int = 1  # its rows are every so many-th

    @property
    def row_blocks(self) -> int:
        return self.cols // FORMATS[self.format].block

    @property
    def blocks(self) -> int:
        return self.rows * self.row_blocks

    @property
    def constants(self) -> tuple[int, ...]:
        """Constexpr arguments P0 … P3 of kernels: the planes; with scales before all, the units of 32 weights per row
        too.
        """
        known = (*self.planes, self.cols // 32) if FORMATS[self.format].scales else self.planes
        return (*known, 0, 0, 0)[:4]

    @property
    def nbytes(self) -> int:
        """Bytes from the start of the first plane to the end of the last; alone in a buffer, the buffer's size."""
        return self.planes[-1] - self.planes[0] + aligned(self.blocks * PLANES[self.format][-1])

    def rows_from(self, start: int, rows: int, pitch: int = 1) -> Matrix:
        """Return every `pitch`-th row from `start`, in the same planes."""
        form = FORMATS[self.format]
        if form.scales and form.tiled:
            assert (start % form.scales.rows, pitch) == (0, 1), f"row {start} lies within a tile of {self.format}"
        skipped = plane_sizes(self.format, start, self.cols)
        planes = tuple(at + size for at, size in zip(self.planes, skipped, strict=True))
        return replace(self, rows=rows, planes=planes, pitch=pitch)


@dataclass(frozen=True)
class Run:
    """Contiguous run of `blocks` blocks of one format at byte `source` of a record, and where their planes start in a
    slot.
    """

    format: str
    source: int
    blocks: int
    planes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the record."""
        return self.blocks * FORMATS[self.format].bytes


@dataclass(frozen=True)
class SlotLayout:
    """Layout of a record in its slot: gate and up [F, H], down [H, F]."""

    gate: Matrix
    up: Matrix
    down: Matrix
    nbytes: int
    runs: tuple[Run, ...]

    @property
    def hidden(self) -> int:
        return self.down.rows

    @property
    def expert_hidden(self) -> int:
        return self.down.cols


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def plane_sizes(fmt: str, rows: int, cols: int) -> tuple[int, ...]:
    """Return the bytes of a matrix's planes; scales that precede all blocks come first."""
    form, blocks = FORMATS[fmt], rows * cols // FORMATS[fmt].block
    scales = (form.scales_nbytes(rows, cols),) if form.scales else ()
    return (*scales, *(blocks * size for size in PLANES[fmt]))


def planes_from(fmt: str, rows: int, cols: int, start: int) -> tuple[tuple[int, ...], int]:
    """Return where a matrix's planes begin when the first begins at `start`, and where the last ends."""
    ends = list(accumulate((aligned(size) for size in plane_sizes(fmt, rows, cols)), initial=start))
    return tuple(ends[:-1]), ends[-1]


def matrix(fmt: str, rows: int, cols: int, start: int = 0) -> Matrix:
    """Return a matrix alone in a buffer, or from byte `start` of one."""
    FORMATS[fmt].nbytes(rows, cols)  # raises where rows are no whole blocks
    return Matrix(fmt, rows, cols, planes_from(fmt, rows, cols, start)[0])


def slot_layout(layout: RecordLayout) -> SlotLayout:
    """Return the slot layout of a record: its parts in order, each in planes; gate and up of a stacked gate_up are
    views.
    """
    matrices, runs, at = {}, [], 0
    for part in layout.parts:
        form = matrix(part.format, part.rows, part.cols, at)
        at = planes_from(part.format, part.rows, part.cols, at)[1]
        runs += runs_of(part.format, part.offset, form)
        matrices[part.name] = form
    if "gate_up" in matrices:
        both = matrices["gate_up"]
        inner = both.rows // 2
        second, pitch = (1, 2) if layout.interleaved else (inner, 1)
        matrices["gate"], matrices["up"] = both.rows_from(0, inner, pitch), both.rows_from(second, inner, pitch)
    return SlotLayout(matrices["gate"], matrices["up"], matrices["down"], at, tuple(runs))


def runs_of(fmt: str, source: int, form: Matrix) -> list[Run]:
    """Return the runs in which a matrix is copied; planes that are separate in the file are copied word by word."""
    if not FORMATS[fmt].apart and not FORMATS[fmt].scales:
        return [Run(fmt, source, form.blocks, form.planes)]
    runs = []
    for size, place in zip(plane_sizes(fmt, form.rows, form.cols), form.planes, strict=True):
        assert size % ALIGN == 0, f"a plane of {size} bytes of {fmt} is no whole number of {ALIGN}"
        runs.append(Run("F32", source, size // 4, (place,)))
        source += size
    return runs


def rearrange(raw: Tensor, layout: SlotLayout) -> Tensor:
    """Rearrange records uint8 [n, ≥ record bytes] into slots uint8 [n, layout.nbytes]; padding is 0."""
    slots = torch.zeros((len(raw), layout.nbytes), dtype=torch.uint8, device=raw.device)
    for run in layout.runs:
        into_planes(raw[:, run.source : run.source + run.nbytes], run.format, run.planes, slots)
    return slots


def rearrange_matrix(raw: Tensor, form: Matrix) -> Tensor:
    """Rearrange one matrix from the file's layout, uint8 [bytes], into a buffer of its own [form.nbytes]."""
    buffer = torch.zeros((1, form.nbytes), dtype=torch.uint8, device=raw.device)
    if not FORMATS[form.format].scales:
        into_planes(raw.view(1, -1), form.format, form.planes, buffer)
        return buffer[0]
    sizes = plane_sizes(form.format, form.rows, form.cols)
    for at, plane in zip(form.planes, raw.flatten().split(sizes), strict=True):
        buffer[0, at : at + len(plane)] = plane
    return buffer[0]


def into_planes(raw: Tensor, fmt: str, planes: tuple[int, ...], target: Tensor) -> None:
    """Split blocks uint8 [n, blocks · bytes] into their planes in `target` [n, …]."""
    form = FORMATS[fmt]
    blocks = together(raw, form) if form.apart else raw.unflatten(1, (-1, form.bytes))
    for at, part in zip(planes, blocks.split(PLANES[fmt], dim=2), strict=True):
        target[:, at : at + part.shape[1] * part.shape[2]] = part.flatten(1)


def unplane(slots: Tensor, form: Matrix) -> Tensor:
    """Return a matrix out of slots uint8 [n, …] in the file's layout: uint8 [n, rows · row bytes]."""
    fmt, parts, lines = FORMATS[form.format], [], (form.rows - 1) * form.pitch + 1
    if fmt.tiled:
        sizes = plane_sizes(form.format, form.rows, form.cols)
        return torch.cat([slots[:, at : at + size] for at, size in zip(form.planes, sizes, strict=True)], dim=1)
    for at, row in zip(form.planes, plane_sizes(form.format, 1, form.cols), strict=True):
        rows = slots[:, at : at + lines * row].unflatten(1, (lines, row))[:, :: form.pitch]
        parts.append(rows.flatten(1))
    if fmt.apart or fmt.scales:
        return torch.cat(parts, dim=1)
    blocks = (part.unflatten(1, (form.blocks, -1)) for part in parts)
    return torch.cat(list(blocks), dim=2).flatten(1)
