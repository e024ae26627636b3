"""Dequantisation of 64 columns of some rows at a time: for the grouped GEMM and for whole matrices.

All products of codes with scales are exact in float32, so contraction to FMA changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.formats.dot_int4 import is_int4
from offmoe.kernels.gpu.formats.dot_scaled import is_f8
from offmoe.kernels.gpu.formats.grids import grids_for, has_grid
from offmoe.kernels.gpu.formats.tile_32 import tile_f8, tile_int4, tile_nvfp4, tile_q8_0, tile_small
from offmoe.kernels.gpu.formats.tile_256 import tile_iq4_xs, tile_k, tile_q2_k, tile_q3_k, tile_q6_k
from offmoe.kernels.gpu.formats.tile_grids import tile_grid
from offmoe.kernels.gpu.gemv import planes
from offmoe.kernels.planes import Matrix

STEP = 64  # columns of a tile


@triton.jit
def tile_float(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr, P0: tl.constexpr):
    k = step * 64 + tl.arange(0, 64)
    mask = there[:, None] & (k < COLS)[None]
    if FORMAT == "F32":
        spot = (base + P0 + row * (COLS * 4)).to(tl.pointer_type(tl.float32))[:, None] + k[None]
        values = tl.load(spot, mask=mask, other=0.0)
    elif FORMAT == "F16":
        spot = (base + P0 + row * (COLS * 2)).to(tl.pointer_type(tl.float16))[:, None] + k[None]
        values = tl.load(spot, mask=mask, other=0.0).to(tl.float32)
    else:  # by its bits: the interpreter has bfloat16 wrong
        spot = (base + P0 + row * (COLS * 2)).to(tl.pointer_type(tl.uint16))[:, None] + k[None]
        values = (tl.load(spot, mask=mask, other=0).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values


@triton.jit
def tile(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr,
         P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, grids):  # fmt: skip
    """Return columns 64 · step … + 63 of rows [R] int64 of the matrix at `base` (or one at each of `base` [R]): float32
    [R, 64].

    Values past COLS, and of rows not `there` [R], are finite: whatever multiplies them has to be 0.
    """
    base += tl.zeros(row.shape, tl.int64)
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        values = tile_k(base, row, there, step, FORMAT == "Q5_K", COLS, P0)
    elif FORMAT == "Q6_K":
        values = tile_q6_k(base, row, there, step, COLS, P0, P1, P2, P3)
    elif FORMAT == "Q2_K":
        values = tile_q2_k(base, row, there, step, COLS, P0, P1, P2)
    elif FORMAT == "Q3_K":
        values = tile_q3_k(base, row, there, step, COLS, P0, P1, P2, P3)
    elif FORMAT == "IQ4_XS":
        values = tile_iq4_xs(base, row, there, step, COLS, P0, P1)
    elif has_grid(FORMAT):
        values = tile_grid(base, row, there, step, FORMAT, COLS, P0, P1, P2, P3, grids)
    elif FORMAT == "Q8_0":
        values = tile_q8_0(base, row, there, step, COLS, P0, P1)
    elif is_f8(FORMAT):
        values = tile_f8(base, row, there, step, FORMAT, COLS, P0, P1)
    elif FORMAT == "NVFP4":
        values = tile_nvfp4(base, row, there, step, FORMAT, COLS, P0, P1, P2)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        values = tile_float(base, row, there, step, FORMAT, COLS, P0)
    elif is_int4(FORMAT):
        values = tile_int4(base, row, there, step, FORMAT, COLS, P0, P1)
    else:
        values = tile_small(base, row, there, step, FORMAT, COLS, P0, P1, P2, P3)
    return tl.reshape(values, (row.shape[0], 64))


@triton.jit
def _unpack(buffer, out, stride, rows, grids, COLS: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr,
            P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Grid (rows / R, columns / 64)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < rows
    step = tl.program_id(1)
    values = tile(buffer, row, there, step, FORMAT, COLS, P0, P1, P2, P3, grids)
    k = step * 64 + tl.arange(0, 64)
    mask = there[:, None] & (k < COLS)[None]
    tl.store(out + row[:, None] * stride + k[None], values.to(out.dtype.element_ty), mask=mask)


def dequantise_into(buffer: Tensor, form: Matrix, out: Tensor) -> None:
    """Dequantise the matrix `form` in `buffer` uint8 [bytes] into out [rows, cols], each value rounded once.

    The buffer starts at a multiple of 16 bytes; rows of `out` may be strided.
    """
    assert out.shape == (form.rows, form.cols)
    assert out.stride(1) == 1
    assert buffer.is_contiguous()
    assert form.cols % max(32, FORMATS[form.format].block) == 0
    _unpack[(triton.cdiv(form.rows, 64), triton.cdiv(form.cols, STEP))](
        buffer, out, out.stride(0), form.rows, grids_for(buffer.device, form.format),
        COLS=form.cols, R=64, FORMAT=form.format, **planes("P", form),
    )  # fmt: skip
