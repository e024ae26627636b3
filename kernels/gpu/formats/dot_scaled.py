"""Dot products of formats whose scales precede all blocks: float8 by tiles and by rows, NVFP4. A unit is 32 weights."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.formats.bits import BACK, dot_8, fp4
from offmoe.kernels.gpu.formats.dot_32 import sum_8


@triton.constexpr_function
def is_f8(fmt):
    return fmt.startswith("F8_")


@triton.constexpr_function
def in_tiles(fmt):
    """Return whether scales are per tile of 128 × 128 weights; else per row."""
    return FORMATS[fmt].tiled


@triton.jit
def scale_at(address, at, mask, FORMAT: tl.constexpr):
    """Load the at-th scale from `address` as float32."""
    if FORMAT == "F8_E4M3_BF16":  # by its bits: the interpreter has bfloat16 wrong
        bits = tl.load(address.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)
        scale = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    return scale


@triton.jit
def scale_of(buffer, origin, at, mask, FORMAT: tl.constexpr, P0: tl.constexpr, UNITS: tl.constexpr):
    """Load the scales of units [R, U]; a row has UNITS units."""
    if in_tiles(FORMAT):
        place = at // UNITS // 128 * ((UNITS + 3) // 4) + at % UNITS // 4
    else:
        place = at // UNITS
    return scale_at(buffer + origin[None, :] * 4 + P0, place, mask, FORMAT)


@triton.jit
def words_f8(buffer, origin, at, mask, FORMAT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
             UNITS: tl.constexpr):  # fmt: skip
    """Load twice four words of codes [R, U, 4], and their scale [R, U]."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    spot = (origin[None, :] + P1 // 4 + at * 8)[:, :, None] + tl.arange(0, 4)[None, None, :]
    m = mask[:, :, None]
    first, second = tl.load(words + spot, mask=m, other=0), tl.load(words + spot + 4, mask=m, other=0)
    return first, second, scale_of(buffer, origin, at, mask, FORMAT, P0, UNITS)


@triton.jit
def fp8(word, SIGN: tl.constexpr, MAGNITUDE: tl.constexpr):
    """Return an e4m3 code as the float32 of 2^-120 times its value; its NaN as 480."""
    if MAGNITUDE >= 0:
        magnitude = word << MAGNITUDE
    else:
        magnitude = word >> -MAGNITUDE
    return (word << SIGN & 0x80000000 | magnitude & 0x07F00000).to(tl.float32, bitcast=True)


@triton.jit
def four_f8(word, x):
    """Return the products of each word's four codes with four of x, over 2^-60."""
    return (fp8(word, 24, 20) * (x[0] * 2.0**60)[None] + fp8(word, 16, 12) * (x[1] * 2.0**60)[None]
            + fp8(word, 8, 4) * (x[2] * 2.0**60)[None] + fp8(word, 0, -4) * (x[3] * 2.0**60)[None])  # fmt: skip


@triton.jit
def fold_f8(words, xs):
    """Return the sums [R, U]."""
    return tl.sum(four_f8(words[0], xs[0]) + four_f8(words[1], xs[1]), 2) * 2.0**60 * words[2]


@triton.jit
def words_nvfp4(buffer, origin, at, mask, FORMAT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
                UNITS: tl.constexpr):  # fmt: skip
    """Load four words of codes [R, U, 4]; both scales of a unit, in two bytes of a number, and its row's [R, U]."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    spot = (origin[None, :] + P2 // 4 + at * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    codes = tl.load(words + spot, mask=mask[:, :, None], other=0)
    small = tl.load(buffer.to(tl.pointer_type(tl.uint16)) + origin[None, :] * 2 + P1 // 2 + at, mask=mask, other=0)
    return codes, small, scale_of(buffer, origin, at, mask, FORMAT, P0, UNITS)


@triton.jit
def fold_nvfp4(words, xs):
    """Return [R, U]; xs from dot_32.x_pairs. The first two words are the first 16 weights.

    Look at the registers on Triton 3.6 and 3.7 when this changes: most ways to write it spill, or take more than 128 in
    `down`.
    """
    w, small = tl.arange(0, 4)[None, None, :], words[1].to(tl.uint32)
    scale = words[2] * (BACK / 2)
    low, high = fp8(small, 24, 20) * 2.0**120 * scale, fp8(small, 16, 12) * 2.0**120 * scale
    codes, even, odd = words[0], xs[0], xs[1]
    total = dot_8(tl.zeros(codes.shape, tl.float32), fp4(codes), fp4(codes >> 16), even, odd)
    total -= (2.0**-45 * sum_8(even, odd))[None]
    first, second = tl.sum(tl.where(w < 2, total, 0.0), 2), tl.sum(tl.where(w < 2, 0.0, total), 2)
    return first * low + second * high
