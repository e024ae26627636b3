"""Dot products of IQ1, IQ2 and IQ3. A thread has 64 neighbouring weights, eight times eight, a unit four threads."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.formats.bits import BACK, dot_8, dot_bytes, dot_nibbles, number, word_of
from offmoe.kernels.gpu.formats.dot_crumbs import lane_word, lane_words
from offmoe.kernels.gpu.formats.grids import entry_of, odd_weights, spread, spread_even, three_bits, two_bits
from offmoe.kernels.gpu.striped import lane_of, load_4


@triton.jit
def apart(values):
    """Return the four in the last dimension of [U, 4, 4], each [U, 4]."""
    even, odd = tl.split(tl.reshape(values, (values.shape[0], 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def x_sixteen(x, norm, base, lane, FROM: tl.constexpr, there, K: tl.constexpr, NORM: tl.constexpr):
    """Load twice eight of a thread's activations: each as two tuples of four [U, 4], and their sum."""
    w = tl.arange(0, 4)[None, None, :]
    four = load_4(x, norm, base[:, None, None], lane[:, :, None], FROM, w, there[:, None, None], K, NORM)
    a, b, c, d = apart(four[0]), apart(four[1]), apart(four[2]), apart(four[3])
    x0, x1, x2, x3 = (
        (a[0], b[0], c[0], d[0]),
        (a[1], b[1], c[1], d[1]),
        (a[2], b[2], c[2], d[2]),
        (a[3], b[3], c[3], d[3]),
    )
    return (x0, x1, sum_of(x0, x1)), (x2, x3, sum_of(x2, x3))


@triton.jit
def sum_of(a, b):
    return ((a[0] + a[1]) + (a[2] + a[3])) + ((b[0] + b[1]) + (b[2] + b[3]))


@triton.jit
def x_eights(x, norm, base, start, there, K: tl.constexpr, NORM: tl.constexpr, grids):
    """Load a thread's 64 activations as eight times eight, see `x_sixteen`, and add the pointer to the grids."""
    lane = lane_of(start[:, None] + (tl.arange(0, 4) * 64)[None, :], K)
    a, b = x_sixteen(x, norm, base, lane, 0, there, K, NORM)
    c, d = x_sixteen(x, norm, base, lane, 16, there, K, NORM)
    e, f = x_sixteen(x, norm, base, lane, 32, there, K, NORM)
    g, h = x_sixteen(x, norm, base, lane, 48, there, K, NORM)
    return a, b, c, d, e, f, g, h, grids


@triton.jit
def lane_double(buffer, origin, at, mask, PLANE: tl.constexpr, UNIT: tl.constexpr, which):
    """Load eight bytes of every thread, uint64 [R, U, 4]: the `which`-th [4] of UNIT of a block."""
    spot = buffer.to(tl.pointer_type(tl.uint64)) + origin[None, :, None] // 2 + PLANE // 8
    return tl.load(spot + at[:, :, None] * UNIT + which[None, None], mask=mask[:, :, None], other=0)


@triton.jit
def scale_at(buffer, origin, at, mask, PLANE: tl.constexpr):
    """Load the blocks' float16 [R, U]."""
    spot = buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + PLANE // 2 + at
    return tl.load(spot, mask=mask, other=0.0)


@triton.jit
def words_grid(buffer, origin, at, mask, FORMAT: tl.constexpr,
               P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Load a thread's part of every plane: indices first, the blocks' scale last."""
    j = tl.arange(0, 4)
    if FORMAT == "IQ1_M":
        blocks = buffer.to(tl.pointer_type(tl.uint64)) + origin[None, :] // 2 + P2 // 8 + at
        return (lane_double(buffer, origin, at, mask, P0, 4, j), lane_word(buffer, origin, at, mask, P1, 4, j),
                tl.load(blocks, mask=mask, other=0))  # fmt: skip
    elif FORMAT == "IQ1_S":
        return (lane_double(buffer, origin, at, mask, P1, 4, j), lane_word(buffer, origin, at, mask, P2, 4, j),
                scale_at(buffer, origin, at, mask, P0))  # fmt: skip
    elif FORMAT == "IQ2_XXS":
        return lane_words(buffer, origin, at, mask, P1, 16, j * 4), scale_at(buffer, origin, at, mask, P0)
    elif FORMAT == "IQ2_XS":
        return (lane_words(buffer, origin, at, mask, P1, 16, j * 4), lane_word(buffer, origin, at, mask, P2, 2, j // 2),
                scale_at(buffer, origin, at, mask, P0))  # fmt: skip
    elif FORMAT == "IQ2_S":
        return (lane_double(buffer, origin, at, mask, P1, 4, j), lane_double(buffer, origin, at, mask, P2, 4, j),
                lane_word(buffer, origin, at, mask, P3, 4, j // 2),
                lane_word(buffer, origin, at, mask, P3, 4, j // 2 + 2),
                scale_at(buffer, origin, at, mask, P0))  # fmt: skip
    elif FORMAT == "IQ3_XXS":
        return (lane_words(buffer, origin, at, mask, P1, 16, j * 4), lane_double(buffer, origin, at, mask, P2, 4, j),
                scale_at(buffer, origin, at, mask, P0))  # fmt: skip
    else:
        return (lane_words(buffer, origin, at, mask, P1, 16, j * 4),
                lane_double(buffer, origin, at, mask, P2, 5, j + 1),
                lane_word(buffer, origin, at, mask, P2, 10, j // 2), lane_word(buffer, origin, at, mask, P3, 1, j * 0),
                scale_at(buffer, origin, at, mask, P0))  # fmt: skip


@triton.jit
def half_word(double, HIGH: tl.constexpr):
    return (double >> 32 if HIGH else double).to(tl.uint32)


@triton.jit
def fold_grid(words, xs, FORMAT: tl.constexpr):
    """Return the sums [R, U, 4]."""
    if FORMAT == "IQ1_M":
        return fold_iq1_m(words, xs)
    elif FORMAT == "IQ1_S":
        return fold_iq1_s(words, xs)
    elif FORMAT == "IQ2_XXS":
        return fold_iq2_xxs(words, xs)
    elif FORMAT == "IQ2_XS":
        return fold_iq2_xs(words, xs)
    elif FORMAT == "IQ2_S":
        return fold_iq2_s(words, xs)
    elif FORMAT == "IQ3_XXS":
        return fold_iq3_xxs(words, xs)
    else:
        return fold_iq3_s(words, xs)


@triton.jit
def dot_two(entry, signs, x):
    """Return Σ of eight weights of IQ2 times x."""
    first, last = two_bits(entry, signs)
    return dot_8(tl.zeros(entry.shape, tl.float32), first, last, x[0], x[1]) * BACK - (64 * x[2])[None]


@triton.jit
def dot_codes(entry, x):
    """Return Σ of eight nibbles times x."""
    zero, a, h = tl.zeros(entry.shape, tl.float32), x[0], x[1]
    low, high = dot_nibbles(zero, zero, entry, a[0], a[1], a[2], a[3], h[0], h[1], h[2], h[3])
    return (low + high) * BACK


@triton.jit
def fold_iq2_xxs(words, xs):
    w, total = tl.arange(0, 4)[None, None, None], 0.0
    for g in tl.static_range(2):
        index, signs = word_of(words[0], w, 2 * g), word_of(words[0], w, 2 * g + 1)
        group = 0.0
        for e in tl.static_range(4):
            entry = entry_of(xs[8], index >> 8 * e & 0xFF, "IQ2_XXS")
            group += dot_two(entry, spread_even(signs >> 7 * e & 127), xs[4 * g + e])
        total += group * (number(signs >> 28) * 0.25 + 0.125)
    return words[1].to(tl.float32)[:, :, None] * total


@triton.jit
def fold_iq2_xs(words, xs):
    w, total = tl.arange(0, 4)[None, None, None], 0.0
    scales = words[1] >> (16 * (tl.arange(0, 4) % 2))[None, None]
    for g in tl.static_range(4):
        codes = word_of(words[0], w, g)
        first, last = entry_of(xs[8], codes & 511, "IQ2_XS"), entry_of(xs[8], codes >> 16 & 511, "IQ2_XS")
        group = dot_two(first, spread_even(codes >> 9 & 127), xs[2 * g])
        group += dot_two(last, spread_even(codes >> 25), xs[2 * g + 1])
        total += group * (number(scales >> 4 * g & 15) * 0.25 + 0.125)
    return words[2].to(tl.float32)[:, :, None] * total


@triton.jit
def fold_iq2_s(words, xs):
    total = 0.0
    odd = (16 * (tl.arange(0, 4) % 2))[None, None]
    upper, scales = words[2] >> odd, words[3] >> odd
    for g in tl.static_range(4):
        lower, signs = half_word(words[0], g > 1) >> g % 2 * 16, half_word(words[1], g > 1) >> g % 2 * 16
        first = entry_of(xs[8], lower & 0xFF | (upper >> 4 * g & 3) << 8, "IQ2_S")
        last = entry_of(xs[8], lower >> 8 & 0xFF | (upper >> 4 * g + 2 & 3) << 8, "IQ2_S")
        group = dot_two(first, spread(signs & 0xFF), xs[2 * g]) + dot_two(
            last, spread(signs >> 8 & 0xFF), xs[2 * g + 1]
        )
        total += group * (number(scales >> 4 * g & 15) * 0.25 + 0.125)
    return words[4].to(tl.float32)[:, :, None] * total


@triton.jit
def fold_iq3_xxs(words, xs):
    w, total = tl.arange(0, 4)[None, None, None], 0.0
    for g in tl.static_range(2):
        signs, group = half_word(words[1], g == 1), 0.0
        for e in tl.static_range(4):
            index, x = word_of(words[0], w, 2 * g + e // 2) >> e % 2 * 16, xs[4 * g + e]
            first, last = three_bits(entry_of(xs[8], index & 0xFF, "IQ3_XXS"),
                                     entry_of(xs[8], index >> 8 & 0xFF, "IQ3_XXS"),
                                     spread_even(signs >> 7 * e & 127))  # fmt: skip
            a, h = x[0], x[1]
            sums = dot_bytes(tl.zeros(first.shape, tl.float32), first, a[0], a[1], a[2], a[3])
            sums = dot_bytes(sums, last, h[0], h[1], h[2], h[3])
            group += sums * BACK - (128 * x[2])[None]
        total += group * (number(signs >> 28) * 0.5 + 0.25)
    return words[2].to(tl.float32)[:, :, None] * total


@triton.jit
def fold_iq3_s(words, xs):
    w, j = tl.arange(0, 4)[None, None, None], tl.arange(0, 4)[None, None]
    total = 0.0
    upper, scales = words[2] >> 16 * (j % 2), words[3] >> 8 * j
    for g in tl.static_range(2):
        group, signs = 0.0, half_word(words[1], g == 1)
        for e in tl.static_range(4):
            index, high, x = word_of(words[0], w, 2 * g + e // 2) >> e % 2 * 16, upper >> 8 * g + 2 * e, xs[4 * g + e]
            first = entry_of(xs[8], index & 0xFF | (high & 1) << 8, "IQ3_S")
            last = entry_of(xs[8], index >> 8 & 0xFF | (high & 2) << 7, "IQ3_S")
            group += dot_codes(odd_weights(first, last, spread(signs >> 8 * e & 0xFF)), x) - (7.5 * x[2])[None]
        total += group * (number(scales >> 4 * g & 15) * 4.0 + 2.0)
    return words[4].to(tl.float32)[:, :, None] * total


@triton.jit
def less_one(bit):
    """Return what is subtracted from codes of IQ1: 1 less an eighth, or (bit 0 set) plus one."""
    return number(bit & 1) * 0.25 + 0.875


@triton.jit
def fold_iq1_s(words, xs):
    total = 0.0
    for g in tl.static_range(2):
        head, lower, group = words[1] >> 16 * g, half_word(words[0], g == 1), 0.0
        zero = less_one(head >> 15)
        for e in tl.static_range(4):
            entry = entry_of(xs[8], lower >> 8 * e & 0xFF | (head >> 3 * e & 7) << 8, "IQ1_S")
            group += dot_codes(entry, xs[4 * g + e]) - zero * xs[4 * g + e][2][None]
        total += group * (number(head >> 12 & 7) * 2.0 + 1.0)
    return words[2].to(tl.float32)[:, :, None] * total


@triton.jit
def scale_iq1_m(small):
    """Return the float16 in the upper nibbles of four 16-bit numbers in uint64."""
    bits = small >> 12 & 0xF | small >> 24 & 0xF0 | small >> 36 & 0xF00 | small >> 48 & 0xF000
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def fold_iq1_m(words, xs):
    total = 0.0
    scales = (words[2][:, :, None] >> (16 * tl.arange(0, 4)).to(tl.uint64)[None, None]).to(tl.uint32)
    for g in tl.static_range(4):
        head, lower = words[1] >> 8 * g, half_word(words[0], g > 1) >> g % 2 * 16
        first = entry_of(xs[8], lower & 0xFF | (head & 7) << 8, "IQ1_M")
        last = entry_of(xs[8], lower >> 8 & 0xFF | (head & 0x70) << 4, "IQ1_M")
        group = dot_codes(first, xs[2 * g]) - less_one(head >> 3) * xs[2 * g][2][None]
        group += dot_codes(last, xs[2 * g + 1]) - less_one(head >> 7) * xs[2 * g + 1][2][None]
        total += group * (number(scales >> 3 * g & 7) * 2.0 + 1.0)
    return scale_iq1_m(words[2])[:, :, None] * total
