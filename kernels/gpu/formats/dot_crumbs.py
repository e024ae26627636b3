"""Dot products of blocks of 256 with 2-bit codes in a plane of their own: Q2_K, Q3_K.

A thread has 16 bytes of the plane, 64 weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.formats.bits import BACK, code, dot_bytes, half_of, number


@triton.jit
def lane_words(buffer, origin, at, mask, PLANE: tl.constexpr, UNIT: tl.constexpr, first):
    """Load four words of every thread [R, U, 4, 4], from its `first` [4] of UNIT words on."""
    spot = buffer.to(tl.pointer_type(tl.uint32)) + origin[None, :, None, None] + PLANE // 4
    spot += at[:, :, None, None] * UNIT + (first[:, None] + tl.arange(0, 4)[None, :])[None, None]
    return tl.load(spot, mask=mask[:, :, None, None], other=0)


@triton.jit
def lane_word(buffer, origin, at, mask, PLANE: tl.constexpr, UNIT: tl.constexpr, which):
    """Load one word of every thread [R, U, 4]: the `which`-th [4]."""
    spot = buffer.to(tl.pointer_type(tl.uint32)) + origin[None, :, None] + PLANE // 4
    return tl.load(spot + at[:, :, None] * UNIT + which[None, None], mask=mask[:, :, None], other=0)


@triton.jit
def words_q2_k(buffer, origin, at, mask, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """Load the planes: 16 bytes of scales and minima, of which a thread has two words [R, U, 4]; 64 of codes [R, U, 4,
    4]; two float16 in a word [R, U].
    """
    j = tl.arange(0, 4)
    head = buffer.to(tl.pointer_type(tl.uint32)) + origin[None, :] + P2 // 4 + at
    return (lane_words(buffer, origin, at, mask, P1, 16, j * 4), lane_word(buffer, origin, at, mask, P0, 4, j // 2 * 2),
            lane_word(buffer, origin, at, mask, P0, 4, j // 2 * 2 + 1), tl.load(head, mask=mask, other=0))  # fmt: skip


@triton.jit
def four_crumbs(word, x, AT: tl.constexpr):
    """Return Σ over words of the two bits from AT on of each word's four bytes, times four of x, · 2^-49: [R, U, 4]."""
    scale: tl.constexpr = 2.0 ** (6 - AT)
    total = code(word, 0x3 << AT) * (x[0] * 2.0**94 * scale)[None]
    total += code(word, 0x300 << AT) * (x[1] * 2.0**86 * scale)[None]
    total += code(word, 0x30000 << AT) * (x[2] * 2.0**78 * scale)[None]
    total += code(word >> 24, 0x3 << AT) * (x[3] * 2.0**94 * scale)[None]
    return tl.sum(total, 3)


@triton.jit
def fold_q2_k(words, xs):
    """Return the sums [R, U, 4]."""
    quants, shift = words[0], (8 * (tl.arange(0, 4) % 2))[None, None]
    first, last = words[1] >> shift, words[2] >> shift  # two bytes of each: a scale's four bits and a minimum's
    scaled = code(first, 0xF) * (four_crumbs(quants, xs[0], 0) * 2.0**100)  # · 2^-98
    scaled += code(first, 0xF0000) * (four_crumbs(quants, xs[1], 2) * 2.0**84)
    scaled += code(last, 0xF) * (four_crumbs(quants, xs[2], 4) * 2.0**100)
    scaled += code(last, 0xF0000) * (four_crumbs(quants, xs[3], 6) * 2.0**84)
    lowered = code(first, 0xF0) * (xs[4] * 2.0**96)[None] + code(first, 0xF00000) * (xs[5] * 2.0**80)[None]
    lowered += code(last, 0xF0) * (xs[6] * 2.0**96)[None] + code(last, 0xF00000) * (xs[7] * 2.0**80)[None]
    head = words[3][:, :, None]
    return half_of(head, False) * 2.0**98 * scaled - half_of(head, True) * BACK * lowered


@triton.jit
def words_q3_k(buffer, origin, at, mask, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):
    """Load the planes: 32 bytes of upper bits and 64 of lower ones [R, U, 4, 4]; three words of scales [R, U]; a
    float16.
    """
    j = tl.arange(0, 4)
    scales = buffer.to(tl.pointer_type(tl.uint32)) + origin[None, :] + P2 // 4 + at * 3
    d = buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + P3 // 2 + at
    return (lane_words(buffer, origin, at, mask, P1, 16, j * 4), lane_words(buffer, origin, at, mask, P0, 8, j % 2 * 4),
            tl.load(scales, mask=mask, other=0), tl.load(scales + 1, mask=mask, other=0),
            tl.load(scales + 2, mask=mask, other=0), tl.load(d, mask=mask, other=0.0))  # fmt: skip


@triton.jit
def q3_scales(low, high):
    """Return four scales of six bits in a word's bytes, from their lower and upper bits."""
    return low & 0x0F0F0F0F | (high & 0x03030303) << 4


@triton.jit
def sixteen_q3(codes, x, x_sum, scale):
    """Return [R, U, 4]: codes of 0 to 7, less 4, times x and times the scale (a word's lowest byte, less 32)."""
    total = dot_bytes(tl.zeros(codes.shape, tl.float32), codes, x[0], x[1], x[2], x[3])
    return (tl.sum(total, 3) * BACK - (4 * x_sum)[None]) * (number(scale & 0xFF) - 32.0)


@triton.jit
def fold_q3_k(words, xs):
    """Return the sums [R, U, 4]."""
    j, quants = tl.arange(0, 4), words[0]
    half, shift = (4 * (j // 2))[None, None], (8 * (j % 2))[None, None]
    upper = words[1] >> half[:, :, :, None]  # from bit 0 on a bit for each sixteen
    high = words[4][:, :, None] >> half
    first = q3_scales(words[2][:, :, None] >> half, high) >> shift
    last = q3_scales(words[3][:, :, None] >> half, high >> 2) >> shift
    total = sixteen_q3(quants & 0x03030303 | upper << 2 & 0x04040404, xs[0], xs[4], first)
    total += sixteen_q3(quants >> 2 & 0x03030303 | upper << 1 & 0x04040404, xs[1], xs[5], first >> 16)
    total += sixteen_q3(quants >> 4 & 0x03030303 | upper & 0x04040404, xs[2], xs[6], last)
    total += sixteen_q3(quants >> 6 & 0x03030303 | upper >> 1 & 0x04040404, xs[3], xs[7], last >> 16)
    return words[5].to(tl.float32)[:, :, None] * total
