"""Dequantisation of blocks of 32, groups of 4-bit codes, float8 and NVFP4, 64 columns at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.formats.bits import four, fp4, in_order, iq4, number
from offmoe.kernels.gpu.formats.dot_32 import fifth_bits
from offmoe.kernels.gpu.formats.dot_int4 import has_zeros, scale_of, sharing
from offmoe.kernels.gpu.formats.dot_scaled import fp8, in_tiles, scale_at
from offmoe.kernels.gpu.formats.tile_words import (
    bytes_at,
    half_from,
    halves_at,
    in_halves,
    looked_up,
    scales_at,
    words_at,
    words_from,
)


@triton.jit
def tile_small(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr,
               P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Two blocks of 32 nibbles: Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4 in both orders; a row's last tile may be one."""
    BLOCKS: tl.constexpr = COLS // 32
    QUANTS: tl.constexpr = P3 if FORMAT == "Q5_1" else P2 if (FORMAT == "Q4_1" or FORMAT == "Q5_0") else P1
    words = tl.reshape(words_at(base + QUANTS, row, there, step, BLOCKS * 4, 8), (row.shape[0], 2, 4))
    if FORMAT == "MXFP4" or FORMAT == "MXFP4_PAIRS":
        exponent = bytes_at(base + P0, row, there, step, BLOCKS, 2)
        half = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23)
        half = half.to(tl.float32, bitcast=True)[:, :, None, None, None, None]
        values = looked_up(fp4(words), fp4(words >> 16), 16.0, FORMAT == "MXFP4_PAIRS") * half
    else:
        scale = scales_at(base + P0, row, there, step, BLOCKS)[:, :, None, None, None, None]
        low, high = words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F
        if FORMAT == "Q4_0":
            values = in_halves(low, high, 8.0) * scale
        elif FORMAT == "IQ4_NL":
            values = looked_up(iq4(words), iq4(words >> 16), 128.0, False) * scale
        elif FORMAT == "Q4_1":
            minimum = scales_at(base + P1, row, there, step, BLOCKS)[:, :, None, None, None, None]
            values = in_halves(low, high, 0.0) * scale + minimum
        else:
            BITS: tl.constexpr = P2 if FORMAT == "Q5_1" else P1
            bits = words_at(base + BITS, row, there, step, BLOCKS, 2)[:, :, None] >> (4 * tl.arange(0, 4))[None, None]
            low, high = low | fifth_bits(bits), high | fifth_bits(bits >> 16)
            if FORMAT == "Q5_1":
                minimum = scales_at(base + P1, row, there, step, BLOCKS)[:, :, None, None, None, None]
                values = in_halves(low, high, 0.0) * scale + minimum
            else:
                values = in_halves(low, high, 16.0) * scale
    return values


@triton.jit
def tile_int4(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Two units of 32, of two groups or of one."""
    UNITS: tl.constexpr = COLS // 32
    GROUPS: tl.constexpr = UNITS // sharing(FORMAT)
    words = tl.reshape(words_at(base + P1, row, there, step, UNITS * 4, 8), (row.shape[0], 2, 4))
    SHARED: tl.constexpr = sharing(FORMAT) > 1
    group, zero = row * GROUPS + step * 2 // sharing(FORMAT), 8.0
    if has_zeros(FORMAT):
        if SHARED:
            head = words_from(base + P0, group, there)[:, None]
        else:
            head = words_at(base + P0, row, there, step, GROUPS, 2)
        zero = number(head >> 16)[:, :, None]
    elif SHARED:
        head = half_from(base + P0, group, there)[:, None]
    else:
        head = halves_at(base + P0, row, there, step, GROUPS)
    low, high = four(words & 0x0F0F0F0F, zero), four(words >> 4 & 0x0F0F0F0F, zero)
    return tl.join(low, high) * scale_of(head.to(tl.uint16), FORMAT)[:, :, None, None, None, None]


@triton.jit
def tile_q8_0(base, row, there, step, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    BLOCKS: tl.constexpr = COLS // 32
    words = tl.reshape(words_at(base + P1, row, there, step, BLOCKS * 8, 16), (row.shape[0], 2, 8))
    return four(words ^ 0x80808080, 128.0) * scales_at(base + P0, row, there, step, BLOCKS)[:, :, None, None, None]


@triton.jit
def tile_f8(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Float8 within one tile's columns: 64 divides 128."""
    words = words_at(base + P1, row, there, step, COLS // 4, 16)
    at = row // 128 * ((COLS + 127) // 128) + step // 2 if in_tiles(FORMAT) else row
    values = in_order(fp8(words, 24, 20), fp8(words, 16, 12), fp8(words, 8, 4), fp8(words, 0, -4))
    return values * 2.0**120 * scale_at(base + P0, at, there, FORMAT)[:, None, None, None]


@triton.jit
def tile_nvfp4(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr,
               P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):  # fmt: skip
    """NVFP4, four groups of 16; the last tile of a row may hold two."""
    SIXTEENS: tl.constexpr = COLS // 16
    words = tl.reshape(words_at(base + P2, row, there, step, SIXTEENS * 2, 8), (row.shape[0], 4, 2))
    half = scale_at(base + P0, row, there, FORMAT)[:, None] * 0.5
    half *= fp8(bytes_at(base + P1, row, there, step, SIXTEENS, 4), 24, 20) * 2.0**120
    return looked_up(fp4(words), fp4(words >> 16), 16.0, True) * half[:, :, None, None, None, None]
