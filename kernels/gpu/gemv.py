"""Products of one to eight tokens with quantised matrices in VRAM: most of a decoded token's time.

All activations and sums are float32; vectors that are read here are striped (kernels.striped). The programs that run at
once divide the rows of a launch among them. A program keeps x in registers, 64 values per thread, and streams its rows
past: the words of the next rows are in flight while these are multiplied. Programs share nothing, so a row's result
does not depend on other launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.formats.dot import UNIT, fold, words_of, x_of
from offmoe.kernels.gpu.formats.grids import grids_for
from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.striped import striped_index
from offmoe.kernels.planes import Matrix

LANE, LANE_OF_FLOATS = 64, 32  # values of x that a lane holds; as many weights of a row, and twice as many rows
# Warps a multiprocessor. 16 need at most 128 registers a lane, which the norm's weights exceed: the head takes 108 µs
# with 12 and 136 with 16, gate and up of 8 experts 9.6 and 8.2.
WARPS, FEWER_WARPS = 16, 12

Part = tuple[Tensor, Matrix]


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def interpreted() -> bool:
    return not isinstance(_dense, triton.JITFunction)


def programs(device: torch.device, warps: int, heavy: bool = False) -> int:
    """Return the programs that run at once; in the interpreter, which pays per program, a few."""
    most = FEWER_WARPS if heavy else WARPS
    return 2 if interpreted() else multiprocessors(device) * max(1, most // warps)


def tile() -> int:
    """Return the rows per tile. For two, Triton 3.6 makes a layout into which x is shuffled, at 210 registers."""
    return 32 if interpreted() else 1


def across(fmt: str, weights: int) -> tuple[int, int]:
    """Return the units of a row, padded, and the warps that hold them."""
    units = triton.next_power_of_2(weights // UNIT[fmt])
    warps = max(1, units * UNIT[fmt] // (32 * (LANE_OF_FLOATS if fmt in ("F32", "F16", "BF16") else LANE)))
    assert warps <= 32, f"{weights} weights a row in {fmt} take {warps} > 32 warps"
    return units, warps


@triton.jit
def rows_of(buffer, origin, unit, there, rows, end, UNITS: tl.constexpr, FORMAT: tl.constexpr,
            P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Load the words of `rows` before `end`; a row has UNITS units, of which the program takes `unit` where `there`."""
    mask = (rows < end)[:, None] & there[None, :]
    return words_of(buffer, origin, rows[:, None] * UNITS + unit[None, :], mask, FORMAT, P0, P1, P2, P3)


@triton.jit
def constant_of(bias, ids, shares, at, inside, N: tl.constexpr):
    """Return the term to add to rows `at` [R]: bias [N], or Σ_j shares[j] · bias [E, N] of expert ids[j]; 0 without
    bias.

    ids and shares [KP] are padded with 0.
    """
    if bias is None:
        value = tl.zeros(at.shape, tl.float32)
    elif ids is None:
        value = tl.load(bias + at, mask=inside, other=0.0)
    else:
        each = tl.load(bias + ids[:, None] * N + at[None, :], mask=inside[None, :], other=0.0)
        value = tl.sum(each * shares[:, None], 0)
    return value


@triton.jit
def capped(x, CAP: tl.constexpr):
    """Return CAP · tanh(x / CAP); CAP 0: x."""
    return x if CAP == 0 else CAP * (2 * tl.sigmoid(x * (2 / CAP)) - 1)


@triton.jit
def stream(buffer, origin, unit, there, words, xs, first, end, out, bias, ids, shares, shift, scale,
           UNITS: tl.constexpr, R: tl.constexpr, N: tl.constexpr, RESIDUAL: tl.constexpr, CAP: tl.constexpr,
           FORMAT: tl.constexpr,
           P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Multiply rows first … end by x and `scale` into `out` from row `shift` on; `words` holds the first R rows.

    bias, ids and shares as in `constant_of`. The residual stream is striped, any other output is not.
    """
    r = tl.arange(0, R)
    constant = constant_of(bias, ids, shares, shift + first + r, first + r < end, N)
    for row in range(first, end, R):
        rows, ahead = row + r, row + R + r
        following = rows_of(buffer, origin, unit, there, ahead, end, UNITS, FORMAT, P0, P1, P2, P3)
        next_constant = constant_of(bias, ids, shares, shift + ahead, ahead < end, N)
        at, inside = shift + rows, rows < end
        if RESIDUAL:
            at = striped_index(at, N)
            before = tl.load(out + at, mask=inside, other=0.0)
            if bias is not None:
                before += constant
            tl.store(out + at, fold(words, xs, FORMAT) * scale + before, mask=inside)
        elif bias is not None:
            tl.store(out + at, fold(words, xs, FORMAT) * scale + constant, mask=inside)
        else:
            tl.store(out + at, capped(fold(words, xs, FORMAT) * scale, CAP), mask=inside)
        words, constant = following, next_constant


@triton.jit
def part(buffer, pid, x, norm, out, bias, shift, eps, each, grids,
         ROWS: tl.constexpr, U: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
         WIDE: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, CAP: tl.constexpr,
         FORMAT: tl.constexpr,
         P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Multiply one part of `_dense`. Weights never change: the first rows load while the preceding kernel runs."""
    UNITS: tl.constexpr = K // WIDTH
    u, first = tl.arange(0, U), pid * each
    end = tl.minimum(first + each, ROWS)
    origin, there, rows = tl.zeros((U,), tl.int32), u < UNITS, first + tl.arange(0, R)
    words = rows_of(buffer, origin, u, there, rows, end, UNITS, FORMAT, P0, P1, P2, P3)
    if PDL:
        tl.extra.cuda.gdc_wait()
    xs = x_of(x, norm, origin, u * WIDTH, there, FORMAT, K, NORM, grids)
    inverse = 1.0
    if NORM:
        i = tl.arange(0, WIDE)
        v = tl.load(x + i, mask=i < K, other=0.0)
        inverse = tl.rsqrt(tl.sum(v * v, 0) / K + eps)
    stream(buffer, origin, u, there, words, xs, first, end, out, bias, None, None, shift, inverse, UNITS, R, N,
           RESIDUAL, CAP, FORMAT, P0, P1, P2, P3)  # fmt: skip


@triton.jit
def _dense(
    x, norm, out, bias, b0, b1, b2, eps, each, grids,
    K: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    CAP: tl.constexpr, F0: tl.constexpr, ROWS0: tl.constexpr, U0: tl.constexpr, WIDTH0: tl.constexpr,
    F1: tl.constexpr, ROWS1: tl.constexpr, U1: tl.constexpr, WIDTH1: tl.constexpr,
    F2: tl.constexpr, ROWS2: tl.constexpr, U2: tl.constexpr, WIDTH2: tl.constexpr,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs of part 0, then of part 1, then of part 2; tokens)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid, t = tl.program_id(0), tl.program_id(1)
    x, out = x + t * K, out + t * N
    second = tl.cdiv(ROWS0, each)
    third = second + tl.cdiv(ROWS1, each)
    if pid < second:
        part(b0, pid, x, norm, out, bias, 0, eps, each, grids, ROWS0, U0, WIDTH0, R, K, WIDE, N, NORM, RESIDUAL, CAP,
             F0, A0, A1, A2, A3, PDL)  # fmt: skip
    if ROWS1 > 0:
        if (pid >= second) & (pid < third):
            part(b1, pid - second, x, norm, out, bias, ROWS0, eps, each, grids, ROWS1, U1, WIDTH1, R, K, WIDE, N, NORM,
                 RESIDUAL, CAP, F1, B0, B1, B2, B3, PDL)  # fmt: skip
    if ROWS2 > 0:
        if pid >= third:
            part(b2, pid - third, x, norm, out, bias, ROWS0 + ROWS1, eps, each, grids, ROWS2, U2, WIDTH2, R, K, WIDE, N,
                 NORM, RESIDUAL, CAP, F2, C0, C1, C2, C3, PDL)  # fmt: skip


def dense(
    x: Tensor, parts: Sequence[Part], out: Tensor, *,
    norm: Tensor | None = None, eps: float = 0.0, bias: Tensor | None = None, residual: bool = False,
    cap: float = 0.0, pdl: bool = False,
) -> None:  # fmt: skip
    """Multiply x [T, K] float32, striped, by the transpose of up to three matrices, concatenated by rows: out [T, N].

    norm [K], striped: x is RMS-normed with it first. residual: `out` is the residual stream, striped, and is added to;
    else it is in natural order. `bias` [N] float32, in natural order, is added. `cap` c: c · tanh(out / c), for a
    product with neither.
    """
    assert not cap or not (residual or bias is not None)
    assert 1 <= len(parts) <= 3 and out.is_contiguous() and x.is_contiguous()
    k, n, rows = x.shape[1], sum(form.rows for _, form in parts), tile()
    assert out.shape == (len(x), n) and all(form.cols == k for _, form in parts)
    warps = max(across(form.format, k)[1] for _, form in parts)
    each = rows * triton.cdiv(n, rows * programs(x.device, warps, norm is not None))
    count = sum(triton.cdiv(form.rows, each) for _, form in parts)
    grids = grids_for(x.device, *(form.format for _, form in parts))
    while len(parts) < 3:
        parts = (*parts, (parts[0][0], Matrix(parts[0][1].format, 0, k, parts[0][1].planes)))
    settings: dict[str, object] = {}
    for i, (_, form) in enumerate(parts):
        settings |= {f"F{i}": form.format, f"ROWS{i}": form.rows, f"WIDTH{i}": UNIT[form.format],
                     f"U{i}": across(form.format, k)[0]}  # fmt: skip
        settings |= {f"{'ABC'[i]}{j}": at for j, at in enumerate(form.constants)}
    _dense[(count, len(x))](
        x, norm, out, bias, *(buffer for buffer, _ in parts), eps, each, grids, K=k,
        WIDE=triton.next_power_of_2(k), N=n,
        R=rows, NORM=norm is not None, RESIDUAL=residual, CAP=cap, **settings, num_warps=warps, **dependent(pdl),
    )  # fmt: skip


def planes(name: str, form: Matrix) -> dict[str, int]:
    return {f"{name}{i}": at for i, at in enumerate(form.constants)}
