"""Quantised weights as floats, 64 columns of some rows at a time: for the grouped GEMM and for whole matrices.

A whole number becomes a float32 with one OR and one subtraction; conversion proper runs at an eighth of the rate. All
products of codes with scales are exact in float32, so contraction to FMA changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.bits import e2m1, half_of, iq4, number
from offmoe.kernels.gpu.dot_256 import k_scales
from offmoe.kernels.gpu.dot_int4 import has_zeros, head_of, is_int4, scale_of, sharing
from offmoe.kernels.gpu.dot_scaled import fp8, in_tiles, is_f8, scale_at
from offmoe.kernels.gpu.gemv import planes
from offmoe.kernels.planes import Matrix

STEP = 64  # columns of a tile


@triton.jit
def tile_k(base, row, there, step, FIVE: tl.constexpr, COLS: tl.constexpr, P0: tl.constexpr):
    """Q4_K and Q5_K: low nibbles of 32 bytes, then the high ones."""
    SIZE: tl.constexpr = 176 if FIVE else 144
    head = base + P0 + row * (COLS // 256 * SIZE) + step // 4 * SIZE  # [R]
    j = step % 4
    g, i = tl.arange(0, 2), tl.arange(0, 32)
    m3 = there[:, None, None]
    quants = tl.load(head[:, None, None] + (SIZE - 128 + j * 32) + i[None, None, :], mask=m3, other=0)  # [R, 1, 32]
    codes = quants.to(tl.uint32) >> (4 * g)[None, :, None] & 15
    if FIVE:
        fifth = tl.load(head[:, None, None] + 16 + i[None, None, :], mask=m3, other=0).to(tl.uint32)
        codes |= (fifth >> (2 * j + g)[None, :, None] & 1) << 4
    words = head.to(tl.pointer_type(tl.uint32))
    h0 = tl.load(words, mask=there, other=0)
    h1 = tl.load(words + 1, mask=there, other=0)
    h2 = tl.load(words + 2, mask=there, other=0)
    h3 = tl.load(words + 3, mask=there, other=0)
    scale, minimum = k_scales(h1, h2, h3, j)
    scale = half_of(h0, False)[:, None] * number(scale[:, None] >> (8 * g)[None] & 63)  # [R, 2]
    minimum = half_of(h0, True)[:, None] * number(minimum[:, None] >> (8 * g)[None] & 63)
    return number(codes) * scale[:, :, None] - minimum[:, :, None]


@triton.jit
def tile_q6_k(base, row, there, step, COLS: tl.constexpr,
              P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Four sixteens: low or high nibbles of 64 bytes, upper bits in 32."""
    BLOCKS: tl.constexpr = COLS // 256
    block, half, part = step // 4, step % 4 // 2, step % 2
    g, i = tl.arange(0, 4), tl.arange(0, 16)
    m3 = there[:, None, None]
    low = base + P0 + row * (BLOCKS * 128) + block * 128 + half * 64
    low = tl.load(low[:, None, None] + (g * 16)[None, :, None] + i[None, None, :], mask=m3, other=0)  # [R, 4, 16]
    high = base + P1 + row * (BLOCKS * 64) + block * 64 + half * 32
    high = tl.load(high[:, None, None] + (g % 2 * 16)[None, :, None] + i[None, None, :], mask=m3, other=0)
    codes = low.to(tl.uint32) >> (4 * part) & 15
    codes |= (high.to(tl.uint32) >> (4 * part + g // 2 * 2)[None, :, None] & 3) << 4
    scales = (base + P2 + row * (BLOCKS * 16) + block * 16 + step % 4 * 4)[:, None] + g[None]
    scale = number(tl.load(scales, mask=there[:, None], other=0).to(tl.uint32) ^ 0x80) - 128.0
    d = (base + P3 + row * (BLOCKS * 2) + block * 2).to(tl.pointer_type(tl.float16))
    scale *= tl.load(d, mask=there, other=0.0).to(tl.float32)[:, None]
    return (number(codes) - 32.0) * scale[:, :, None]


@triton.jit
def tile_small(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr,
               P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):  # fmt: skip
    """Two blocks of 32 in nibbles: Q4_0, Q4_1, Q5_0, IQ4_NL, MXFP4 in both orders; a row's last may hold one."""
    BLOCKS: tl.constexpr = COLS // 32
    QUANTS: tl.constexpr = P2 if (FORMAT == "Q4_1" or FORMAT == "Q5_0") else P1
    b, h, i = step * 2 + tl.arange(0, 2), tl.arange(0, 2), tl.arange(0, 16)
    m2 = there[:, None] & (b < BLOCKS)[None]
    quants = (base + QUANTS + row * (BLOCKS * 16))[:, None, None, None] + (b * 16)[None, :, None, None]
    quants = tl.load(quants + i[None, None, None, :], mask=m2[:, :, None, None], other=0)  # [R, 2, 1, 16]
    codes = quants.to(tl.uint32) >> (4 * h)[None, None, :, None] & 15
    if FORMAT == "MXFP4_PAIRS":
        codes = tl.permute(codes, 0, 1, 3, 2)  # a byte holds two neighbours
    if FORMAT == "MXFP4" or FORMAT == "MXFP4_PAIRS":
        scales = (base + P0 + row * BLOCKS)[:, None] + b[None]
        exponent = tl.load(scales, mask=m2, other=0).to(tl.int32)
        half = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23)
        half = half.to(tl.float32, bitcast=True)
        values = e2m1(codes) * 2.0**127 * half[:, :, None, None]
    else:
        scales = (base + P0 + row * (BLOCKS * 2)).to(tl.pointer_type(tl.float16))[:, None] + b[None]
        scale = tl.load(scales, mask=m2, other=0.0).to(tl.float32)[:, :, None, None]
        if FORMAT == "Q4_0":
            values = (number(codes) - 8.0) * scale
        elif FORMAT == "IQ4_NL":
            values = (number(iq4(codes) & 0xFF) - 128.0) * scale
        elif FORMAT == "Q4_1":
            minima = (base + P1 + row * (BLOCKS * 2)).to(tl.pointer_type(tl.float16))[:, None] + b[None]
            values = number(codes) * scale + tl.load(minima, mask=m2, other=0.0).to(tl.float32)[:, :, None, None]
        else:
            bits = (base + P1 + row * (BLOCKS * 4)).to(tl.pointer_type(tl.uint32))[:, None] + b[None]
            bits = tl.load(bits, mask=m2, other=0)[:, :, None, None]
            codes |= (bits >> (16 * h[:, None] + i[None])[None, None] & 1) << 4
            values = (number(codes) - 16.0) * scale
    return values


@triton.jit
def tile_iq4_xs(base, row, there, step, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Two groups of 32, low nibbles before high ones."""
    block = row * (COLS // 256) + step // 4  # [R]
    g, h, i, j, m3 = tl.arange(0, 2), tl.arange(0, 2), tl.arange(0, 16), step % 4, there[:, None, None]
    codes = (base + P1 + block * 128 + j * 32)[:, None, None] + (g * 16)[None, :, None] + i[None, None, :]
    codes = tl.load(codes, mask=m3, other=0).to(tl.uint32)[:, :, None, :] >> (4 * h)[None, None, :, None]
    head = (base + P0 + block * 8).to(tl.pointer_type(tl.uint32))
    first, scales = tl.load(head, mask=there, other=0), tl.load(head + 1, mask=there, other=0)
    scale = scales[:, None] >> (8 * j + 4 * g)[None] & 15 | (first[:, None] >> (16 + 4 * j + 2 * g)[None] & 3) << 4
    scale = half_of(first, False)[:, None] * (number(scale) - 32.0)  # [R, 2]
    return (number(iq4(codes & 15) & 0xFF) - 128.0) * scale[:, :, None, None]


@triton.jit
def tile_int4(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Two units of 32, of two groups or of one."""
    UNITS: tl.constexpr = COLS // 32
    GROUPS: tl.constexpr = UNITS // sharing(FORMAT)
    u, h, i = step * 2 + tl.arange(0, 2), tl.arange(0, 2), tl.arange(0, 16)
    m2 = there[:, None] & (u < UNITS)[None]
    codes = (base + P1 + row * (UNITS * 16))[:, None, None] + (u * 16)[None, :, None] + i[None, None]
    codes = tl.load(codes, mask=m2[:, :, None], other=0).to(tl.uint32)  # [R, 2, 16]
    codes = codes[:, :, :, None] >> (4 * h)[None, None, None] & 15
    head = head_of(base + P0, (row * GROUPS)[:, None] + (u // sharing(FORMAT))[None], m2, FORMAT)
    scale = scale_of(head, FORMAT)[:, :, None, None]
    if has_zeros(FORMAT):
        values = (number(codes) - number(head >> 16)[:, :, None, None]) * scale
    else:
        values = (number(codes) - 8.0) * scale
    return values


@triton.jit
def tile_q8_0(base, row, there, step, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    BLOCKS: tl.constexpr = COLS // 32
    b, i = step * 2 + tl.arange(0, 2), tl.arange(0, 32)
    m2 = there[:, None] & (b < BLOCKS)[None]
    quants = (base + P1 + row * (BLOCKS * 32))[:, None, None] + (b * 32)[None, :, None] + i[None, None, :]
    codes = tl.load(quants, mask=m2[:, :, None], other=0).to(tl.uint32) ^ 0x80
    scales = (base + P0 + row * (BLOCKS * 2)).to(tl.pointer_type(tl.float16))[:, None] + b[None]
    return (number(codes) - 128.0) * tl.load(scales, mask=m2, other=0.0).to(tl.float32)[:, :, None]


@triton.jit
def tile_f8(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Within one tile's columns: 64 divides 128."""
    k = step * 64 + tl.arange(0, 64)
    mask = there[:, None] & (k < COLS)[None]
    code = tl.load((base + P1 + row * COLS)[:, None] + k[None], mask=mask, other=0).to(tl.uint32)
    at = row // 128 * ((COLS + 127) // 128) + step // 2 if in_tiles(FORMAT) else row
    return fp8(code, 24, 20) * 2.0**120 * scale_at(base + P0, at, there, FORMAT)[:, None]


@triton.jit
def tile_nvfp4(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr,
               P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):  # fmt: skip
    """Four sixteens; the last tile of a row may hold two."""
    SIXTEENS: tl.constexpr = COLS // 16
    s, h, i = step * 4 + tl.arange(0, 4), tl.arange(0, 2), tl.arange(0, 8)
    m2 = there[:, None] & (s < SIXTEENS)[None]
    codes = (base + P2 + row * (SIXTEENS * 8))[:, None, None] + (s * 8)[None, :, None] + i[None, None]
    codes = tl.load(codes, mask=m2[:, :, None], other=0).to(tl.uint32)[:, :, :, None]  # [R, 4, 8, 1]
    codes = codes >> (4 * h)[None, None, None] & 15
    small = tl.load((base + P1 + row * SIXTEENS)[:, None] + s[None], mask=m2, other=0).to(tl.uint32)
    small = fp8(small, 24, 20) * 2.0**120 * scale_at(base + P0, row, there, FORMAT)[:, None]
    return e2m1(codes) * 2.0**126 * small[:, :, None, None]


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
         P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Columns 64 · step … + 63 of rows [R] int64 of the matrix at `base`, float32 [R, 64]. Finite past COLS, and
    where not `there` [R]: what they are multiplied by has to be 0."""
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        values = tile_k(base, row, there, step, FORMAT == "Q5_K", COLS, P0)
    elif FORMAT == "Q6_K":
        values = tile_q6_k(base, row, there, step, COLS, P0, P1, P2, P3)
    elif FORMAT == "IQ4_XS":
        values = tile_iq4_xs(base, row, there, step, COLS, P0, P1)
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
        values = tile_small(base, row, there, step, FORMAT, COLS, P0, P1, P2)
    return tl.reshape(values, (row.shape[0], 64))


@triton.jit
def _unpack(buffer, out, stride, rows, COLS: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr,
            P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Grid (rows / R, columns / 64)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < rows
    step = tl.program_id(1)
    values = tile(buffer, row, there, step, FORMAT, COLS, P0, P1, P2, P3)
    k = step * 64 + tl.arange(0, 64)
    mask = there[:, None] & (k < COLS)[None]
    tl.store(out + row[:, None] * stride + k[None], values.to(out.dtype.element_ty), mask=mask)


def dequantise_into(buffer: Tensor, form: Matrix, out: Tensor) -> None:
    """The matrix `form` in `buffer` uint8 [bytes] → out [rows, cols] in its type, each value rounded once.

    The buffer starts at a multiple of 16 bytes; rows of `out` may be apart.
    """
    assert out.shape == (form.rows, form.cols)
    assert out.stride(1) == 1
    assert buffer.is_contiguous()
    assert form.cols % max(32, FORMATS[form.format].block) == 0
    _unpack[(triton.cdiv(form.rows, 64), triton.cdiv(form.cols, STEP))](
        buffer, out, out.stride(0), form.rows, COLS=form.cols, R=64, FORMAT=form.format, **planes("P", form),
    )  # fmt: skip
