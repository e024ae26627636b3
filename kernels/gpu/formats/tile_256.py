"""Dequantisation of blocks of 256, 64 columns at a time: Q2_K to Q6_K, IQ4_XS."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.formats.bits import four, half_of, iq4, number
from offmoe.kernels.gpu.formats.dot_256 import k_scales
from offmoe.kernels.gpu.formats.dot_crumbs import q3_scales
from offmoe.kernels.gpu.formats.tile_words import (
    double_from,
    eight_words,
    half_from,
    in_halves,
    looked_up,
    words_at,
    words_from,
)


@triton.jit
def tile_k(base, row, there, step, FIVE: tl.constexpr, COLS: tl.constexpr, P0: tl.constexpr):
    """Q4_K and Q5_K: low nibbles of 32 bytes, then the high ones."""
    SIZE: tl.constexpr = 176 if FIVE else 144
    head = base + P0 + row * (COLS // 256 * SIZE) + step // 4 * SIZE  # [R]
    j, g = step % 4, tl.arange(0, 2)
    quants = eight_words(head + (SIZE - 128) + j * 32, there)
    low, high = quants & 0x0F0F0F0F, quants >> 4 & 0x0F0F0F0F
    if FIVE:
        fifth = eight_words(head + 16, there) >> (2 * j)
        low |= (fifth & 0x01010101) << 4
        high |= (fifth & 0x02020202) << 3
    first, last = double_from(head, 0, there), double_from(head, 1, there)
    h0 = first.to(tl.uint32)
    scale, minimum = k_scales((first >> 32).to(tl.uint32), last.to(tl.uint32), (last >> 32).to(tl.uint32), j)
    scale = half_of(h0, False)[:, None] * number(scale[:, None] >> (8 * g)[None] & 63)  # [R, 2]
    minimum = half_of(h0, True)[:, None] * number(minimum[:, None] >> (8 * g)[None] & 63)
    scale, minimum = scale[:, None, :, None, None, None], minimum[:, None, :, None, None, None]
    return in_halves(low, high, 0.0) * scale - minimum


@triton.jit
def tile_q2_k(base, row, there, step, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """Q2_K, four groups of 16: two bits of 32 bytes, then the next two."""
    block, b, at = row * (COLS // 256) + step // 4, (8 * tl.arange(0, 4))[None], step % 2 * 4
    words = eight_words(base + P1 + row * (COLS // 4) + step // 2 * 32, there)
    head, both = words_from(base + P2, block, there), words_from(base + P0 + block * 16, step % 4, there)[:, None] >> b
    scale = half_of(head, False)[:, None] * number(both & 15)  # [R, 4]
    minimum = half_of(head, True)[:, None] * number(both >> 4 & 15)
    values = in_halves(words >> at & 0x03030303, words >> at + 2 & 0x03030303, 0.0)
    values = tl.reshape(values, (row.shape[0], 4, 16)) * scale[:, :, None]
    return values - minimum[:, :, None]


@triton.jit
def tile_q3_k(base, row, there, step, COLS: tl.constexpr,
              P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Q3_K, as Q2_K with a third bit out of 32 bytes, which all eight such groups of a block share."""
    block, b, q, at = row * (COLS // 256) + step // 4, (8 * tl.arange(0, 4))[None], step % 4, step % 2 * 4
    words = eight_words(base + P1 + row * (COLS // 4) + step // 2 * 32, there)
    upper = eight_words(base + P0 + block * 32, there) >> q * 2
    scales = base + P2 + block * 12
    low, high = words_from(scales, q % 2, there) >> (q // 2 * 4), words_from(scales, 2, there) >> (q * 2)
    word = half_from(base + P3, block, there)
    scale = half_of(word, False)[:, None] * (number(q3_scales(low, high)[:, None] >> b & 0xFF) - 32.0)
    values = in_halves(words >> at & 0x03030303 | (upper & 0x01010101) << 2,
                       words >> at + 2 & 0x03030303 | (upper & 0x02020202) << 1, 4.0)  # fmt: skip
    return tl.reshape(values, (row.shape[0], 4, 16)) * scale[:, :, None]


@triton.jit
def tile_q6_k(base, row, there, step, COLS: tl.constexpr,
              P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Q6_K, four groups of 16: low or high nibbles of 64 bytes, upper bits in 32."""
    BLOCKS: tl.constexpr = COLS // 256
    R: tl.constexpr = row.shape[0]
    block, part, g = row * BLOCKS + step // 4, step % 2, tl.arange(0, 4)
    low = tl.reshape(words_at(base + P0, row, there, step // 2, BLOCKS * 32, 16), (R, 2, 8))
    high = words_at(base + P1, row, there, step // 2, BLOCKS * 16, 8)[:, None, :]
    codes = low >> (4 * part) & 0x0F0F0F0F
    codes |= (high >> (4 * part + 2 * tl.arange(0, 2))[None, :, None] & 0x03030303) << 4
    scale = words_from(base + P2 + block * 16, step % 4, there)[:, None] >> (8 * g)[None]  # [R, 4]
    word = half_from(base + P3, block, there)
    scale = (number(scale & 0xFF ^ 0x80) - 128.0) * half_of(word, False)[:, None]
    return four(tl.reshape(codes, (R, 4, 4)), 32.0) * scale[:, :, None, None, None]


@triton.jit
def tile_iq4_xs(base, row, there, step, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """IQ4_XS, two groups of 32: low nibbles before high ones."""
    head, g, j = base + P0 + (row * (COLS // 256) + step // 4) * 8, tl.arange(0, 2), step % 4
    words = tl.reshape(words_at(base + P1, row, there, step, COLS // 8, 8), (row.shape[0], 2, 4))
    first, scales = words_from(head, 0, there), words_from(head, 1, there)
    scale = scales[:, None] >> (8 * j + 4 * g)[None] & 15 | (first[:, None] >> (16 + 4 * j + 2 * g)[None] & 3) << 4
    scale = half_of(first, False)[:, None] * (number(scale) - 32.0)  # [R, 2]
    return looked_up(iq4(words), iq4(words >> 16), 128.0, False) * scale[:, :, None, None, None, None]
