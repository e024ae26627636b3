"""Movers: the first programs of `expert_gate_up` while records are missing.

Each copies a few rows of a record's gate and up, with the scales they need, and multiplies them; then the movers copy
down, which the next launch multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.page_in import (
    BLOCKS,
    CHUNK_BLOCKS,
    FIELDS,
    Copies,
    check,
    copy_part,
    described,
    merged,
    room_of,
    step_of,
)
from offmoe.kernels.planes import PLANES, Matrix, Run, SlotLayout

MOVER_CHUNK = 2048  # bytes that a warp brings before it multiplies them
# One of so many programs that run at once is a mover where anything is missing. They spend much of their time with what
# they have brought: of gpt-oss-20b's records 128 brought 43.2 GB/s, 256 46.6 and 512 48.1, of 49.5 that cores can read.
MOVING = 2


@triton.jit
def bring_rows(source, record, stage, first, end, ROWS: tl.constexpr, INNER: tl.constexpr, STRIPS: tl.constexpr,
               TILES: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Copy rows first … end of gate and up, at most ROWS, from address `source` into the slot at `record`.

    The scales that they share with rows of other movers are copied too.
    """
    for strip in tl.static_range(len(STRIPS) // FIELDS):
        bring_strip(source, record, stage, first, end, ROWS, INNER, STRIPS, 1 + strip * FIELDS, TILES[strip], CHUNK)
    tl.debug_barrier()  # other threads read them


@triton.jit
def bring_strip(source, record, stage, first, end, ROWS: tl.constexpr, INNER: tl.constexpr, RUNS: tl.constexpr,
                AT: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Copy the rows' part of the run at AT; TILE is the number of rows that share one row of its blocks."""
    TOTAL: tl.constexpr = RUNS[AT + BLOCKS]
    if TILE == 1:
        EACH: tl.constexpr = TOTAL * ROWS // INNER
        begin, last = first // ROWS * EACH, tl.cdiv(end, ROWS) * EACH
    else:  # whole words of 16 bytes; a row of tiles may begin within a block
        DEEP: tl.constexpr = triton.cdiv(INNER, TILE)  # tl.cdiv makes no constant in Triton 3.6
        begin, last = first // TILE * TOTAL // DEEP // 4 * 4, tl.cdiv(tl.cdiv(end, TILE) * TOTAL, DEEP * 4) * 4
    last = tl.minimum(last, TOTAL)
    for block in range(begin, last, RUNS[AT + CHUNK_BLOCKS]):
        copy_part(source, record, stage, block, tl.minimum(RUNS[AT + CHUNK_BLOCKS], last - block), RUNS, AT, CHUNK)


@dataclass(frozen=True)
class Strips:
    """Gate and up of a layout as separate runs, for copying a few rows at a time.

    `tiles`: rows of the matrix that one row of each run's blocks serves (1, except where rows share scales). `rows`:
    rows of both matrices that are copied together. `down`: the remaining runs.
    """

    runs: tuple[Run, ...]
    tiles: tuple[int, ...]
    down: tuple[Run, ...]
    rows: int

    @classmethod
    @cache
    def of(cls, layout: SlotLayout, chunk: int) -> Strips:
        """Return the strips of a layout for movers that stage `chunk` bytes."""
        strips, down, inner = [], [], layout.gate.rows
        for run in layout.runs:
            end = run.planes[0] + run.blocks * PLANES[run.format][0]
            of_gate, of_up = (any(run.planes[0] <= at < end for at in form.planes) for form in (layout.gate, layout.up))
            parts = 2 if of_gate and of_up and layout.gate.pitch == 1 else 1
            blocks = run.blocks // parts
            for part in range(parts if of_gate or of_up else 0):
                planes = tuple(
                    at + part * blocks * size for at, size in zip(run.planes, PLANES[run.format], strict=True)
                )
                strips.append(Run(run.format, run.source + part * run.nbytes // parts, blocks, planes))
            if not of_gate and not of_up:
                down.append(run)
        tiles = tuple(rows_sharing(run, (layout.gate, layout.up)) for run in strips)
        rows, alone = 1, [run for run, tile in zip(strips, tiles, strict=True) if tile == 1]
        while any(run.blocks * rows % (inner * step_of(run)) for run in alone):
            rows *= 2
        while rows < inner and all(run.nbytes * rows * 2 <= inner * room_of(run, chunk) for run in strips):
            rows *= 2
        return cls(tuple(strips), tiles, merged(tuple(down)), rows)


def rows_sharing(run: Run, matrices: tuple[Matrix, ...]) -> int:
    """Return the rows that share one entry of the run if it is the scales' plane of a matrix, else 1."""
    for form in matrices:
        scales = FORMATS[form.format].scales
        if scales and run.planes[0] == form.planes[0]:
            return scales.rows
    return 1


def movers_of(programs: int) -> int:
    """Return how many of a launch's `programs` are movers."""
    return max(1, programs // MOVING)


def chunk_of(warps: int) -> int:
    """Return the bytes that a mover of `warps` warps stages."""
    return MOVER_CHUNK * warps


def moving_of(copies: Copies | None, records: Tensor, layout: SlotLayout, warps: int, programs: int) -> dict[str, Any]:
    """Return the movers' constexpr arguments of a launch."""
    if copies is None:
        return {"MOVERS": 0, "STRIPS": None, "TILES": None, "ROWS": 1, "DOWN": None, "CHUNK": 0, "LISTED": 0, "KP": 1}
    movers, chunk = movers_of(programs), chunk_of(warps)
    check(copies, records, movers, chunk)
    strips, listed = Strips.of(layout, chunk), len(copies.slots)
    return {"MOVERS": movers, "STRIPS": described(strips.runs, chunk), "TILES": strips.tiles, "ROWS": strips.rows,
            "DOWN": described(strips.down, chunk), "CHUNK": chunk, "LISTED": listed,
            "KP": triton.next_power_of_2(listed)}  # fmt: skip
