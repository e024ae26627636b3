"""Dot products of blocks of 256: Q4_K, Q5_K, Q6_K, IQ4_XS. A thread has 64 weights, a unit four threads."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.formats.bits import BACK, code, dot_8, dot_bytes, dot_nibbles, half_of, iq4, number, word_of
from offmoe.kernels.gpu.striped import lane_of, load_4, sum_4


@triton.jit
def k_scales(h1, h2, h3, j):
    """Return scales and minima (integers, in bytes 0 and 1) of groups 2j and 2j + 1 out of the 12 bytes of Q4_K and
    Q5_K.

    See formats.k_scales.
    """
    shift = (j & 1) * 16
    scale, minimum, rest = h1 >> shift, h2 >> shift, h3 >> shift
    late = j >= 2
    scale = tl.where(late, rest & 0x0F0F | scale >> 2 & 0x3030, scale & 0x3F3F)
    minimum = tl.where(late, rest >> 4 & 0x0F0F | minimum >> 2 & 0x3030, minimum & 0x3F3F)
    return scale, minimum


@triton.jit
def k_words(low, high, quants, fifth, l0, l1, l2, l3, g0, g1, g2, g3, FIVE: tl.constexpr):
    """Add a word's low and high nibbles, with their fifth bits."""
    if FIVE:
        low = dot_bytes(low, quants & 0x0F0F0F0F | (fifth & 0x01010101) << 4, l0, l1, l2, l3)
        high = dot_bytes(high, quants >> 4 & 0x0F0F0F0F | (fifth & 0x02020202) << 3, g0, g1, g2, g3)
        return low, high
    else:
        return dot_nibbles(low, high, quants, l0, l1, l2, l3, g0, g1, g2, g3)


@triton.jit
def x_k(x, norm, base, start, there, K: tl.constexpr, NORM: tl.constexpr):
    """Load a thread's 64 activations for Q4_K, Q5_K and IQ4_XS as four groups of 16 [U, 4, 4], and the sums of both
    halves [U, 4].
    """
    j, w = tl.arange(0, 4), tl.arange(0, 4)[None, None, :]
    lane = lane_of(start[:, None] + j[None, :] * 64, K)[:, :, None]
    b, m = base[:, None, None], there[:, None, None]
    first, second = load_4(x, norm, b, lane, 0, w, m, K, NORM), load_4(x, norm, b, lane, 16, w, m, K, NORM)
    third, fourth = load_4(x, norm, b, lane, 32, w, m, K, NORM), load_4(x, norm, b, lane, 48, w, m, K, NORM)
    low = tl.sum(sum_4(first) + sum_4(second), 2)
    high = tl.sum(sum_4(third) + sum_4(fourth), 2)
    return first, second, third, fourth, low, high


@triton.jit
def words_k(buffer, origin, at, mask, FIVE: tl.constexpr, P0: tl.constexpr):
    """Load the header's four words, twice four words of quants, and the fifth bits if any, all [R, U, 4, 4]."""
    SIZE: tl.constexpr = 44 if FIVE else 36
    words = buffer.to(tl.pointer_type(tl.uint32))
    head = (origin[None, :] + (P0 // 4) + at * SIZE)[:, :, None, None]
    j, w = tl.arange(0, 4)[None, None, :, None], tl.arange(0, 4)[None, None, None, :]
    m = mask[:, :, None, None]
    spot = head + (SIZE - 32) + (j * 8 + w)
    header = tl.load(words + head + (j * 0 + w), mask=m, other=0)
    first, second = tl.load(words + spot, mask=m, other=0), tl.load(words + spot + 4, mask=m, other=0)
    if FIVE:
        bits = head + 4 + (j * 0 + w)
        return header, first, second, tl.load(words + bits, mask=m, other=0), tl.load(words + bits + 4, mask=m, other=0)
    else:
        return header, first, second


@triton.jit
def fold_k(words, xs, FIVE: tl.constexpr):
    """Return [R, U, 4]. A thread has 32 bytes of quants: two groups of 32 weights, their scales read once."""
    header, first, second = words[0], words[1], words[2]
    a, b, c, d = xs[0], xs[1], xs[2], xs[3]
    w, j = tl.arange(0, 4)[None, None, None, :], tl.arange(0, 4)
    fifth, fifth_second = first, second
    if FIVE:
        shift = (2 * j)[None, None, :, None]
        fifth, fifth_second = words[3] >> shift, words[4] >> shift
    zero = tl.zeros(first.shape, tl.float32)
    low, high = k_words(zero, zero, first, fifth, a[0], a[1], a[2], a[3], c[0], c[1], c[2], c[3], FIVE)
    low, high = k_words(low, high, second, fifth_second, b[0], b[1], b[2], b[3], d[0], d[1], d[2], d[3], FIVE)
    low, high = tl.sum(low, 3), tl.sum(high, 3)
    h0 = word_of(header, w, 0)
    scale, minimum = k_scales(word_of(header, w, 1), word_of(header, w, 2), word_of(header, w, 3), j[None, None, :])
    scaled = code(scale, 0xFF) * (low * 2.0**100) + code(scale, 0xFF00) * (high * 2.0**92)  # · 2^-98
    lowered = code(minimum, 0xFF) * (xs[4] * 2.0**100)[None] + code(minimum, 0xFF00) * (xs[5] * 2.0**92)[None]
    return half_of(h0, False) * 2.0**98 * scaled - half_of(h0, True) * BACK * lowered


@triton.jit
def x_sixteens(x, norm, base, start, there, K: tl.constexpr, NORM: tl.constexpr, PART: tl.constexpr):
    """Load x for Q6_K (PART 32), Q2_K and Q3_K (PART 16), and its sums [U, 4].

    Thread j = 2 half + part has four groups of 16 [U, 4, 4]: at PART · part, 48 - PART after it, and 64 after both.
    """
    j, w = tl.arange(0, 4), tl.arange(0, 4)[None, None, :]
    begin = start[:, None] + (j // 2 * 128 + j % 2 * PART)[None, :]
    low, high = lane_of(begin, K)[:, :, None], lane_of(begin + 64, K)[:, :, None]
    b, m = base[:, None, None], there[:, None, None]
    l0, l1 = load_4(x, norm, b, low, 0, w, m, K, NORM), load_4(x, norm, b, low, 48 - PART, w, m, K, NORM)
    h0, h1 = load_4(x, norm, b, high, 0, w, m, K, NORM), load_4(x, norm, b, high, 48 - PART, w, m, K, NORM)
    return (l0, l1, h0, h1, tl.sum(sum_4(l0), 2), tl.sum(sum_4(l1), 2), tl.sum(sum_4(h0), 2), tl.sum(sum_4(h1), 2))


@triton.jit
def words_q6_k(buffer, origin, at, mask, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):
    """Planes: 128 bytes of low nibbles, 64 of upper bits [R, U, 4, 4] twice, four of 16 scales [R, U, 4], 1 float16."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    j, w = tl.arange(0, 4), tl.arange(0, 4)
    m4, m3, origin4 = mask[:, :, None, None], mask[:, :, None], origin[None, :, None, None]
    low = words + origin4 + P0 // 4 + at[:, :, None, None] * 32 + (j[:, None] * 8 + w[None, :])[None, None]
    high = words + origin4 + P1 // 4 + at[:, :, None, None] * 16 + (j[:, None] // 2 * 8 + w[None, :])[None, None]
    scales = buffer.to(tl.pointer_type(tl.int8)) + origin[None, :, None] * 4 + P2 + at[:, :, None] * 16
    scales += (j // 2 * 8 + j % 2 * 2)[None, None]
    d = buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + P3 // 2 + at
    return (tl.load(low, mask=m4, other=0), tl.load(low + 4, mask=m4, other=0),
            tl.load(high, mask=m4, other=0), tl.load(high + 4, mask=m4, other=0),
            tl.load(scales, mask=m3, other=0), tl.load(scales + 1, mask=m3, other=0),
            tl.load(scales + 4, mask=m3, other=0), tl.load(scales + 5, mask=m3, other=0),
            tl.load(d, mask=mask, other=0.0))  # fmt: skip


@triton.jit
def sixteens(nibbles, crumbs, low_x, high_x, l_sum, h_sum, l_scale, h_scale):
    zero = tl.zeros(nibbles.shape, tl.float32)
    low = nibbles & 0x0F0F0F0F | (crumbs & 0x03030303) << 4
    low = dot_bytes(zero, low, low_x[0], low_x[1], low_x[2], low_x[3])
    high = dot_bytes(zero, nibbles >> 4 & 0x0F0F0F0F | crumbs & 0x30303030, high_x[0], high_x[1], high_x[2], high_x[3])
    low = tl.sum(low, 3) * BACK - (32 * l_sum)[None]
    high = tl.sum(high, 3) * BACK - (32 * h_sum)[None]
    return low * l_scale.to(tl.float32) + high * h_scale.to(tl.float32)


@triton.jit
def fold_q6_k(words, xs):
    """Return the sums [R, U, 4]."""
    shift = (2 * (tl.arange(0, 4) % 2))[None, None, :, None]
    total = sixteens(words[0], words[2] >> shift, xs[0], xs[2], xs[4], xs[6], words[4], words[6])
    total += sixteens(words[1], words[3] >> shift, xs[1], xs[3], xs[5], xs[7], words[5], words[7])
    return words[8].to(tl.float32)[:, :, None] * total


@triton.jit
def words_iq4_xs(buffer, origin, at, mask, P0: tl.constexpr, P1: tl.constexpr):
    """Load the planes: 8 bytes of scales as two words [R, U, 4]; 128 of nibbles, twice four words a thread [R, U, 4,
    4].
    """
    words = buffer.to(tl.pointer_type(tl.uint32))
    j, w = tl.arange(0, 4), tl.arange(0, 4)
    head = words + origin[None, :, None] + P0 // 4 + at[:, :, None] * 2 + (j * 0)[None, None]
    spot = words + origin[None, :, None, None] + P1 // 4 + at[:, :, None, None] * 32
    spot += (j[:, None] * 8 + w[None, :])[None, None]
    m3, m4 = mask[:, :, None], mask[:, :, None, None]
    return (tl.load(head, mask=m3, other=0), tl.load(head + 1, mask=m3, other=0),
            tl.load(spot, mask=m4, other=0), tl.load(spot + 4, mask=m4, other=0))  # fmt: skip


@triton.jit
def group_iq4(quants, a, h, x_sum):
    total = dot_8(tl.zeros(quants.shape, tl.float32), iq4(quants), iq4(quants >> 16), a, h)
    return tl.sum(total, 3) * BACK - (128 * x_sum)[None]


@triton.jit
def fold_iq4_xs(words, xs):
    """Return [R, U, 4]. A thread has two groups of 32: see formats.iq4_xs."""
    j = tl.arange(0, 4)[None, None, :]
    low, high = words[1] >> 8 * j, words[0] >> (16 + 4 * j)
    first = number(low & 15 | (high & 3) << 4) - 32.0
    second = number(low >> 4 & 15 | (high & 12) << 2) - 32.0
    total = group_iq4(words[2], xs[0], xs[1], xs[4]) * first + group_iq4(words[3], xs[2], xs[3], xs[5]) * second
    return half_of(words[0], False) * total
