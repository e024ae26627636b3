"""Dot products of blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4 in both orders and Q8_0."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.formats.bits import BACK, dot_8, dot_bytes, dot_nibbles, fp4, iq4
from offmoe.kernels.gpu.striped import lane_of, load_4, load_x


@triton.jit
def sum_8(a, h):
    """Sum in the order of `dot_8`, so that a constant offset subtracted from every value cancels exactly."""
    return ((((((a[0] + h[0]) + h[1]) + a[1]) + a[2]) + h[2]) + h[3]) + a[3]


@triton.jit
def x_32(x, norm, base, start, there, K: tl.constexpr, NORM: tl.constexpr):
    """Load x of a block of 32 as two groups of 16 [U, 4], and its sum [U]."""
    w, lane = tl.arange(0, 4)[None, :], lane_of(start, K)[:, None]
    b, m = base[:, None], there[:, None]
    low, high = load_4(x, norm, b, lane, 0, w, m, K, NORM), load_4(x, norm, b, lane, 16, w, m, K, NORM)
    return low, high, tl.sum(sum_8(low, high), 1)


@triton.jit
def x_pairs(x, norm, base, start, there, K: tl.constexpr, NORM: tl.constexpr):
    """Load x for MXFP4_PAIRS: word w holds values 8w … 8w + 7, its bytes' low nibbles values 0, 2, 4 and 6 of them."""
    NEXT: tl.constexpr = K // 16 if K % 64 == 0 else 1
    LATER: tl.constexpr = 1 if K % 64 == 0 else 4  # from value i to i + 4
    w = tl.arange(0, 4)[None, :]
    at = lane_of(start, K)[:, None] + (w // 2 * (4 * NEXT) + w % 2 * 2 if K % 64 == 0 else w * 8)
    b, m = base[:, None], there[:, None]
    even = (load_x(x, norm, b, at, m, NORM), load_x(x, norm, b, at + 2 * NEXT, m, NORM),
            load_x(x, norm, b, at + LATER, m, NORM), load_x(x, norm, b, at + LATER + 2 * NEXT, m, NORM))  # fmt: skip
    at += NEXT
    odd = (load_x(x, norm, b, at, m, NORM), load_x(x, norm, b, at + 2 * NEXT, m, NORM),
           load_x(x, norm, b, at + LATER, m, NORM), load_x(x, norm, b, at + LATER + 2 * NEXT, m, NORM))  # fmt: skip
    return even, odd, tl.sum(sum_8(even, odd), 1)


@triton.jit
def fifth_bits(bits):
    """Move bits 0 … 3 to bit 4 of bytes 0 … 3."""
    return (bits & 15) * 0x02040810 & 0x10101010


@triton.jit
def words_small(buffer, origin, at, mask, FORMAT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
                P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Load blocks of 32 nibbles [R, U, 4]; their scale [R, U]; minimum and fifth bits [R, U], where there are."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    QUANTS: tl.constexpr = P3 if FORMAT == "Q5_1" else P2 if (FORMAT == "Q4_1" or FORMAT == "Q5_0") else P1
    spot = (origin[None, :] + QUANTS // 4 + at * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    quants = tl.load(words + spot, mask=mask[:, :, None], other=0)
    halves = buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + at
    if FORMAT == "MXFP4" or FORMAT == "MXFP4_PAIRS":
        return quants, tl.load(buffer + origin[None, :] * 4 + P0 + at, mask=mask, other=0)
    elif FORMAT == "Q4_0" or FORMAT == "IQ4_NL":
        return quants, tl.load(halves + P0 // 2, mask=mask, other=0.0)
    elif FORMAT == "Q4_1":
        return (quants, tl.load(halves + P0 // 2, mask=mask, other=0.0),
                tl.load(halves + P1 // 2, mask=mask, other=0.0))  # fmt: skip
    elif FORMAT == "Q5_1":
        return (quants, tl.load(halves + P0 // 2, mask=mask, other=0.0),
                tl.load(words + origin[None, :] + P2 // 4 + at, mask=mask, other=0),
                tl.load(halves + P1 // 2, mask=mask, other=0.0))  # fmt: skip
    else:
        return (quants, tl.load(halves + P0 // 2, mask=mask, other=0.0),
                tl.load(words + origin[None, :] + P1 // 4 + at, mask=mask, other=0))  # fmt: skip


@triton.jit
def fold_small(words, xs, FORMAT: tl.constexpr):
    """Fold Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL and MXFP4 in both orders: [R, U]."""
    quants, a, h, x_sum = words[0], xs[0], xs[1], xs[2][None]
    zero = tl.zeros(quants.shape, tl.float32)
    if FORMAT == "MXFP4" or FORMAT == "MXFP4_PAIRS":
        exponent = words[1].to(tl.uint32)
        scale = tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
        total = dot_8(zero, fp4(quants), fp4(quants >> 16), a, h)
        return scale * (tl.sum(total, 2) * (BACK / 2) - 8 * x_sum)
    elif FORMAT == "IQ4_NL":
        total = dot_8(zero, iq4(quants), iq4(quants >> 16), a, h)
        return words[1].to(tl.float32) * (tl.sum(total, 2) * BACK - 128 * x_sum)
    elif FORMAT == "Q5_0" or FORMAT == "Q5_1":
        bits = words[2][:, :, None] >> (4 * tl.arange(0, 4))[None, None, :]
        total = dot_bytes(zero, quants & 0x0F0F0F0F | fifth_bits(bits), a[0], a[1], a[2], a[3])
        total = dot_bytes(total, quants >> 4 & 0x0F0F0F0F | fifth_bits(bits >> 16), h[0], h[1], h[2], h[3])
        total = tl.sum(total, 2) * BACK
        if FORMAT == "Q5_1":
            return words[1].to(tl.float32) * total + words[3].to(tl.float32) * x_sum
        else:
            return words[1].to(tl.float32) * (total - 16 * x_sum)
    else:
        low, high = dot_nibbles(zero, zero, quants, a[0], a[1], a[2], a[3], h[0], h[1], h[2], h[3])
        total = tl.sum(low + high, 2) * BACK
        if FORMAT == "Q4_0":
            return words[1].to(tl.float32) * (total - 8 * x_sum)
        else:
            return words[1].to(tl.float32) * total + words[2].to(tl.float32) * x_sum


@triton.jit
def words_q8_0(buffer, origin, at, mask, P0: tl.constexpr, P1: tl.constexpr):
    """Load twice four words [R, U, 4], and the scale [R, U]."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    spot = (origin[None, :] + P1 // 4 + at * 8)[:, :, None] + tl.arange(0, 4)[None, None, :]
    m = mask[:, :, None]
    d = buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + P0 // 2 + at
    return (tl.load(words + spot, mask=m, other=0), tl.load(words + spot + 4, mask=m, other=0),
            tl.load(d, mask=mask, other=0.0))  # fmt: skip


@triton.jit
def fold_q8_0(words, xs):
    """Fold signed bytes, read as unsigned ones that are 128 too large: [R, U]."""
    a, h = xs[0], xs[1]
    total = dot_bytes(tl.zeros(words[0].shape, tl.float32), words[0] ^ 0x80808080, a[0], a[1], a[2], a[3])
    total = dot_bytes(total, words[1] ^ 0x80808080, h[0], h[1], h[2], h[3])
    return words[2].to(tl.float32) * (tl.sum(total, 2) * BACK - (128 * xs[2])[None])
