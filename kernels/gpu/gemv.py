"""Products of one to eight tokens with quantised matrices, straight from slots: most of a decoded token's time.

All activations and sums are float32; vectors that are read here are striped (kernels.striped). A program takes a
few rows over all columns; nothing is shared between programs, so a row's result is the same whatever else is launched.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.dot import UNIT, dot, place
from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.planes import Matrix, SlotLayout

ALL, HITS, MISSES = 0, 1, 2  # which pairs: by the phase of a layer

Part = tuple[Tensor, Matrix]


# Lanes of a warp that one unit of a row keeps busy: a row of 2,048 weights in blocks of 256 is one warp's.
LANES = {"Q4_K": 4, "Q5_K": 4, "Q6_K": 4, "F32": 8, "F16": 4, "BF16": 4}


def across(fmt: str, units: int) -> int:
    """Units of a row that a warp takes at once, about 2,048 weights."""
    return min(triton.next_power_of_2(units), 32 // LANES[fmt] if fmt in LANES else 64)


def many(rows: int) -> int:
    """Rows a program; the interpreter pays by the program, whatever it does."""
    return rows if isinstance(_dense, triton.JITFunction) else max(rows, 64)


@triton.jit
def row_sums(buffer, row, x, norm, inverse, ROWS: tl.constexpr, UNITS: tl.constexpr, U: tl.constexpr,
             WIDTH: tl.constexpr, FORMAT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
             P3: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Rows [R] of the matrix at `buffer` times x: [R]."""
    total = tl.zeros(row.shape, tl.float32)
    origin = tl.zeros((U,), tl.int64)
    base = tl.zeros((U,), tl.int32)
    for first in tl.static_range(0, UNITS, U):
        u = first + tl.arange(0, U)
        factor = tl.where(u < UNITS, inverse, 0.0)
        mask = (row < ROWS)[:, None] & (u < UNITS)[None, :]
        total += dot(buffer, origin, row[:, None] * UNITS + u[None, :], mask, x, norm, base, u * WIDTH, factor,
                     FORMAT, P0, P1, P2, P3, K, NORM)  # fmt: skip
    return total


@triton.jit
def finish(row, sums, out, first, ROWS: tl.constexpr, N: tl.constexpr, RESIDUAL: tl.constexpr):
    """Into `out` from its row `first` on; the residual stream is striped, anything else is not."""
    at = first + row
    if RESIDUAL:
        at = place(at, N)
        sums += tl.load(out + at, mask=row < ROWS, other=0.0)
    tl.store(out + at, sums, mask=row < ROWS)


@triton.jit
def _dense(
    x, norm, out, b0, b1, b2, eps,
    K: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    F0: tl.constexpr, ROWS0: tl.constexpr, R0: tl.constexpr, U0: tl.constexpr, WIDTH0: tl.constexpr,
    F1: tl.constexpr, ROWS1: tl.constexpr, R1: tl.constexpr, U1: tl.constexpr, WIDTH1: tl.constexpr,
    F2: tl.constexpr, ROWS2: tl.constexpr, R2: tl.constexpr, U2: tl.constexpr, WIDTH2: tl.constexpr,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs of part 0, then of part 1, then of part 2; tokens)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid, t = tl.program_id(0), tl.program_id(1)
    x, out = x + t * K, out + t * N
    inverse = 1.0
    if NORM:
        i = tl.arange(0, WIDE)
        v = tl.load(x + i, mask=i < K, other=0.0)
        inverse = tl.rsqrt(tl.sum(v * v, 0) / K + eps)
    FIRST: tl.constexpr = (ROWS0 + R0 - 1) // R0
    SECOND: tl.constexpr = FIRST + (ROWS1 + R1 - 1) // R1
    if pid < FIRST:
        row = pid * R0 + tl.arange(0, R0)
        sums = row_sums(b0, row, x, norm, inverse, ROWS0, K // WIDTH0, U0, WIDTH0, F0, A0, A1, A2, A3, K, NORM)
        finish(row, sums, out, 0, ROWS0, N, RESIDUAL)
    if ROWS1 > 0:
        if (pid >= FIRST) & (pid < SECOND):
            row = (pid - FIRST) * R1 + tl.arange(0, R1)
            sums = row_sums(b1, row, x, norm, inverse, ROWS1, K // WIDTH1, U1, WIDTH1, F1, B0, B1, B2, B3, K, NORM)
            finish(row, sums, out, ROWS0, ROWS1, N, RESIDUAL)
    if ROWS2 > 0:
        if pid >= SECOND:
            row = (pid - SECOND) * R2 + tl.arange(0, R2)
            sums = row_sums(b2, row, x, norm, inverse, ROWS2, K // WIDTH2, U2, WIDTH2, F2, C0, C1, C2, C3, K, NORM)
            finish(row, sums, out, ROWS0 + ROWS1, ROWS2, N, RESIDUAL)


def dense(
    x: Tensor, parts: Sequence[Part], out: Tensor, *,
    norm: Tensor | None = None, eps: float = 0.0, residual: bool = False, pdl: bool = False,
    rows: int = 4, warps: int = 1,
) -> None:  # fmt: skip
    """x [T, K] float32, striped, times the transpose of up to three matrices, rows one after another: out [T, N].

    norm [K], striped: x is RMS-normed with it first. residual: `out` is the residual stream, striped, and is added
    to; else it is in natural order.
    """
    rows = many(rows)
    assert 1 <= len(parts) <= 3 and out.is_contiguous() and x.is_contiguous()
    k, n = x.shape[1], sum(form.rows for _, form in parts)
    assert out.shape == (len(x), n) and all(form.cols == k for _, form in parts)
    while len(parts) < 3:
        parts = (*parts, (parts[0][0], Matrix(parts[0][1].format, 0, k, parts[0][1].planes)))
    settings: dict[str, object] = {}
    programs = 0
    for i, (_, form) in enumerate(parts):
        settings |= {f"F{i}": form.format, f"ROWS{i}": form.rows, f"R{i}": rows, f"WIDTH{i}": UNIT[form.format],
                     f"U{i}": across(form.format, k // UNIT[form.format])}  # fmt: skip
        settings |= {f"{'ABC'[i]}{j}": at for j, at in enumerate((*form.planes, 0, 0, 0)[:4])}
        programs += triton.cdiv(form.rows, rows)
    _dense[(programs, len(x))](
        x, norm, out, *(buffer for buffer, _ in parts), eps, K=k, WIDE=triton.next_power_of_2(k), N=n,
        NORM=norm is not None, RESIDUAL=residual, **settings, num_warps=warps, **dependent(pdl),
    )  # fmt: skip


@triton.jit
def _gate_up(
    records, stride, slots, hit, weights, x, out, k,
    H: tl.constexpr, INNER: tl.constexpr, PHASE: tl.constexpr, R: tl.constexpr,
    FG: tl.constexpr, UG: tl.constexpr, WG: tl.constexpr,
    G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, G3: tl.constexpr,
    FU: tl.constexpr, UU: tl.constexpr, WU: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, U3: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (INNER / R, pairs)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(1)
    if PHASE != 0:
        if (tl.load(hit + pair) != 0) != (PHASE == 1):
            return
    record = records + tl.load(slots + pair).to(tl.int64) * stride
    x = x + (pair // k) * H
    row = tl.program_id(0) * R + tl.arange(0, R)
    gate = row_sums(record, row, x, x, 1.0, INNER, H // WG, UG, WG, FG, G0, G1, G2, G3, H, False)
    up = row_sums(record, row, x, x, 1.0, INNER, H // WU, UU, WU, FU, U0, U1, U2, U3, H, False)
    inner = gate * tl.sigmoid(gate) * up * tl.load(weights + pair)
    tl.store(out + pair * INNER + place(row, INNER), inner, mask=row < INNER)


def expert_gate_up(
    records: Tensor, layout: SlotLayout, slots: Tensor, weights: Tensor, x: Tensor, out: Tensor, *,
    hit: Tensor | None = None, phase: int = ALL, pdl: bool = False, rows: int = 2, warps: int = 1,
) -> None:  # fmt: skip
    """weight · silu(gate x) · (up x) of every pair: records [S, stride] uint8, slots [P] int32, weights [P] float32,
    x [T, H] striped → out [P, F] striped.

    Pair p is of token p // (P / T). hit [P] int32: phase HITS takes pairs where it is not 0, MISSES the others.
    """
    rows = many(rows)
    assert x.is_contiguous() and out.is_contiguous() and records.stride(1) == 1
    gate, up, h = layout.gate, layout.up, x.shape[1]
    _gate_up[(triton.cdiv(gate.rows, rows), len(slots))](
        records, records.stride(0), slots, hit, weights, x, out, len(slots) // len(x),
        H=h, INNER=gate.rows, PHASE=phase, R=rows,
        FG=gate.format, UG=across(gate.format, h // UNIT[gate.format]), WG=UNIT[gate.format], **planes("G", gate),
        FU=up.format, UU=across(up.format, h // UNIT[up.format]), WU=UNIT[up.format], **planes("U", up),
        num_warps=warps, **dependent(pdl),
    )  # fmt: skip


@triton.jit
def _down(
    records, stride, slots, inner, x,
    K: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
    FORMAT: tl.constexpr, WIDTH: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (H / R, tokens): the K experts of a token as one long row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(1)
    UNITS: tl.constexpr = INNER // WIDTH
    row = tl.program_id(0) * R + tl.arange(0, R)
    total = tl.zeros((R,), tl.float32)
    for first in tl.static_range(0, K * UNITS, U):
        u = first + tl.arange(0, U)
        there = u < K * UNITS
        pair = t * K + u // UNITS
        origin = tl.load(slots + pair, mask=there, other=0).to(tl.int64) * (stride // 4)
        factor = tl.where(there, 1.0, 0.0)
        mask = (row < H)[:, None] & there[None, :]
        total += dot(records, origin, row[:, None] * UNITS + (u % UNITS)[None, :], mask, inner, inner,
                     pair * INNER, u % UNITS * WIDTH, factor, FORMAT, P0, P1, P2, P3, INNER, False)  # fmt: skip
    finish(row, total, x + t * H, 0, H, H, True)


def expert_down(
    records: Tensor, layout: SlotLayout, slots: Tensor, inner: Tensor, x: Tensor, *,
    pdl: bool = False, rows: int = 4, warps: int = 2,
) -> None:  # fmt: skip
    """x [T, H] += Σ_j down_j inner[t, j], summed in float32 in one fixed order; `inner` is weighted already.

    records [S, stride] uint8, slots [T · k] int32, inner [T · k, F] and x float32, striped.
    """
    rows = many(rows)
    assert x.is_contiguous() and inner.is_contiguous() and records.stride(1) == 1
    down, k = layout.down, len(slots) // len(x)
    units = across(down.format, down.cols // UNIT[down.format] * k)
    _down[(triton.cdiv(down.rows, rows), len(x))](
        records, records.stride(0), slots, inner, x, K=k, H=down.rows, INNER=down.cols, R=rows, U=units,
        FORMAT=down.format, WIDTH=UNIT[down.format], **planes("P", down), num_warps=warps, **dependent(pdl),
    )  # fmt: skip


def planes(name: str, form: Matrix) -> dict[str, int]:
    return {f"{name}{i}": at for i, at in enumerate((*form.planes, 0, 0, 0)[:4])}
