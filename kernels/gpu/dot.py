"""Dot products of quantised rows with a float32 vector, a format a function: the inner part of every GEMV.

A tile is R rows × U units; a unit is a block of 256 weights, or one of 32. Three steps, so that x stays in registers
while rows stream past and the words of the next rows are under way while these are multiplied: `x_of`, `words_of`,
`fold`.

Weights are never turned into floats one by one: integer instructions run at half the rate of FMA, and int → float
conversion at an eighth. A code of n bits at bit p of a word, the others masked off, *is* a float32: the subnormal
q · 2^(p - 149). Multiplied by x · 2^(100 - p) it gives q · x · 2^-49 exactly; the sum of a group is scaled back with
the group's own scale. So a weight costs one AND and one FMA. Scales are applied to a group's sum, minima to the sum of
its x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.formats import FORMATS

BACK = tl.constexpr(2.0**49)
# Weights a unit: a block of 256, or one of 32; 32 of a float format.
UNIT = {name: max(32, form.block) for name, form in FORMATS.items()}


@triton.jit
def lane_of(i, K: tl.constexpr):
    """Where value i, a multiple of 16, of an activation of K values stands; the compiler sees a multiple of 4."""
    if K % 64 == 0:
        return (i % 64 // 4 * (K // 64) + i // 64) * 4
    else:
        return i


@triton.jit
def place(i, K: tl.constexpr):
    """Where any value stands: see kernels.striped."""
    if K % 64 == 0:
        return lane_of(i // 16 * 16, K) + i % 4 * (K // 16) + i % 16 // 4
    else:
        return i


@triton.jit
def load_x(x, norm, base, at, mask, NORM: tl.constexpr):
    """What stands at `at` of the vector at `base` of x, 0 where it is masked; times the norm's weight."""
    value = tl.load(x + base + at, mask=mask, other=0.0)
    if NORM:
        value = value * tl.load(norm + at, mask=mask, other=0.0)
    return value


@triton.jit
def load_4(x, norm, base, lane, FROM: tl.constexpr, w, mask, K: tl.constexpr, NORM: tl.constexpr):
    """Of the sixteen that begin FROM values behind the one at `lane`, the four neighbours in each word w."""
    NEXT: tl.constexpr = K // 16 if K % 64 == 0 else 1
    at = lane + (FROM // 4 * NEXT + w if K % 64 == 0 else FROM + w * 4)
    return (load_x(x, norm, base, at, mask, NORM),
            load_x(x, norm, base, at + NEXT, mask, NORM),
            load_x(x, norm, base, at + 2 * NEXT, mask, NORM),
            load_x(x, norm, base, at + 3 * NEXT, mask, NORM))  # fmt: skip


@triton.jit
def sum_4(a):
    return (a[0] + a[1]) + (a[2] + a[3])


@triton.jit
def word_of(words, w, N: tl.constexpr):
    """Word N of the four in the last dimension."""
    return tl.sum(tl.where(w == N, words, 0), len(words.shape) - 1)


@triton.jit
def code(word, MASK: tl.constexpr):
    """The bits of MASK as the subnormal float that they are."""
    return (word & MASK).to(tl.float32, bitcast=True)


@triton.jit
def dot_nibbles(low, high, word, l0, l1, l2, l3, h0, h1, h2, h3):
    """Adds Σ of a word's low nibbles times l, and of its high ones times h, both · 2^-49. One chain of FMA each."""
    top = word >> 20
    low = code(word, 0xF) * (l0 * 2.0**100)[None] + low
    high = code(word, 0xF0) * (h0 * 2.0**96)[None] + high
    low = code(word, 0xF00) * (l1 * 2.0**92)[None] + low
    high = code(word, 0xF000) * (h1 * 2.0**88)[None] + high
    low = code(word, 0xF0000) * (l2 * 2.0**84)[None] + low
    high = code(top, 0xF) * (h2 * 2.0**100)[None] + high
    low = code(top, 0xF0) * (l3 * 2.0**96)[None] + low
    high = code(top, 0xF00) * (h3 * 2.0**92)[None] + high
    return low, high


@triton.jit
def dot_bytes(total, word, x0, x1, x2, x3):
    """Adds Σ of a word's 4 unsigned bytes times x, · 2^-49."""
    top = word >> 16
    total = code(word, 0xFF) * (x0 * 2.0**100)[None] + total
    total = code(word, 0xFF00) * (x1 * 2.0**92)[None] + total
    total = code(top, 0xFF) * (x2 * 2.0**100)[None] + total
    return code(top, 0xFF00) * (x3 * 2.0**92)[None] + total


@triton.jit
def k_scales(h1, h2, h3, j):
    """Scales and minima (whole numbers, in bytes 0 and 1) of the groups 2j and 2j + 1 out of the 12 bytes of Q4_K and
    Q5_K; see formats.k_scales."""
    shift = (j & 1) * 16
    scale, minimum, rest = h1 >> shift, h2 >> shift, h3 >> shift
    late = j >= 2
    scale = tl.where(late, rest & 0x0F0F | scale >> 2 & 0x3030, scale & 0x3F3F)
    minimum = tl.where(late, rest >> 4 & 0x0F0F | minimum >> 2 & 0x3030, minimum & 0x3F3F)
    return scale, minimum


@triton.jit
def half_of(word, HIGH: tl.constexpr):
    """One of the two float16 in a word."""
    bits = (word >> 16 if HIGH else word & 0xFFFF).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def k_words(low, high, quants, fifth, l0, l1, l2, l3, g0, g1, g2, g3, FIVE: tl.constexpr):
    """Adds a word's low and high nibbles, with their fifth bits."""
    if FIVE:
        low = dot_bytes(low, quants & 0x0F0F0F0F | (fifth & 0x01010101) << 4, l0, l1, l2, l3)
        high = dot_bytes(high, quants >> 4 & 0x0F0F0F0F | (fifth & 0x02020202) << 3, g0, g1, g2, g3)
        return low, high
    else:
        return dot_nibbles(low, high, quants, l0, l1, l2, l3, g0, g1, g2, g3)


@triton.jit
def x_k(x, norm, base, start, there, K: tl.constexpr, NORM: tl.constexpr):
    """Of Q4_K and Q5_K: a lane's 64 values, in four sixteens [U, 4, 4], and the sums of both halves [U, 4]."""
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
    """The header's four words, twice four of quants, and where they lie the fifth bits, all [R, U, 4, 4]."""
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
    """[R, U, 4]. A lane has 32 bytes of quants: two groups of 32 weights, their scales read once."""
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
def x_q6_k(x, norm, base, start, there, K: tl.constexpr, NORM: tl.constexpr):
    """A lane j = 2 half + part has four sixteens [U, 4, 4], and their sums [U, 4]."""
    j, w = tl.arange(0, 4), tl.arange(0, 4)[None, None, :]
    begin = start[:, None] + (j // 2 * 128 + j % 2 * 32)[None, :]
    low, high = lane_of(begin, K)[:, :, None], lane_of(begin + 64, K)[:, :, None]
    b, m = base[:, None, None], there[:, None, None]
    l0, l1 = load_4(x, norm, b, low, 0, w, m, K, NORM), load_4(x, norm, b, low, 16, w, m, K, NORM)
    h0, h1 = load_4(x, norm, b, high, 0, w, m, K, NORM), load_4(x, norm, b, high, 16, w, m, K, NORM)
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
    """[R, U, 4]."""
    shift = (2 * (tl.arange(0, 4) % 2))[None, None, :, None]
    total = sixteens(words[0], words[2] >> shift, xs[0], xs[2], xs[4], xs[6], words[4], words[6])
    total += sixteens(words[1], words[3] >> shift, xs[1], xs[3], xs[5], xs[7], words[5], words[7])
    return words[8].to(tl.float32)[:, :, None] * total


@triton.jit
def x_32(x, norm, base, start, there, K: tl.constexpr, NORM: tl.constexpr):
    """Of a block of 32: both sixteens [U, 4] and the sum [U]."""
    w, lane = tl.arange(0, 4)[None, :], lane_of(start, K)[:, None]
    b, m = base[:, None], there[:, None]
    low, high = load_4(x, norm, b, lane, 0, w, m, K, NORM), load_4(x, norm, b, lane, 16, w, m, K, NORM)
    return low, high, tl.sum(sum_4(low) + sum_4(high), 1)


@triton.jit
def words_small(buffer, origin, at, mask, FORMAT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
                P2: tl.constexpr):  # fmt: skip
    """Blocks of 32 in nibbles [R, U, 4]; their scale [R, U]; minimum or fifth bits [R, U], where there are."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    QUANTS: tl.constexpr = P1 if (FORMAT == "Q4_0" or FORMAT == "MXFP4") else P2
    spot = (origin[None, :] + QUANTS // 4 + at * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    quants = tl.load(words + spot, mask=mask[:, :, None], other=0)
    halves = buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + at
    if FORMAT == "MXFP4":
        return quants, tl.load(buffer + origin[None, :] * 4 + P0 + at, mask=mask, other=0)
    elif FORMAT == "Q4_0":
        return quants, tl.load(halves + P0 // 2, mask=mask, other=0.0)
    elif FORMAT == "Q4_1":
        return (quants, tl.load(halves + P0 // 2, mask=mask, other=0.0),
                tl.load(halves + P1 // 2, mask=mask, other=0.0))  # fmt: skip
    else:
        return (quants, tl.load(halves + P0 // 2, mask=mask, other=0.0),
                tl.load(words + origin[None, :] + P1 // 4 + at, mask=mask, other=0))  # fmt: skip


@triton.jit
def fold_small(words, xs, FORMAT: tl.constexpr):
    """Q4_0, Q4_1, Q5_0, MXFP4 → [R, U]."""
    quants, a, h, x_sum = words[0], xs[0], xs[1], xs[2][None]
    zero = tl.zeros(quants.shape, tl.float32)
    if FORMAT == "MXFP4":
        # fmt: off
        total = (fp4(quants, 28, 22) * (a[0] * 2.0**63)[None] + fp4(quants, 20, 14) * (a[1] * 2.0**63)[None]
                 + fp4(quants, 12, 6) * (a[2] * 2.0**63)[None] + fp4(quants, 4, -2) * (a[3] * 2.0**63)[None]
                 + fp4(quants, 24, 18) * (h[0] * 2.0**63)[None] + fp4(quants, 16, 10) * (h[1] * 2.0**63)[None]
                 + fp4(quants, 8, 2) * (h[2] * 2.0**63)[None] + fp4(quants, 0, -6) * (h[3] * 2.0**63)[None])
        # fmt: on
        exponent = words[1].to(tl.uint32)
        scale = tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
        return tl.sum(total, 2) * 2.0**63 * scale
    elif FORMAT == "Q5_0":
        bits = words[2][:, :, None] >> (4 * tl.arange(0, 4))[None, None, :]
        total = dot_bytes(zero, quants & 0x0F0F0F0F | fifth_bits(bits), a[0], a[1], a[2], a[3])
        total = dot_bytes(total, quants >> 4 & 0x0F0F0F0F | fifth_bits(bits >> 16), h[0], h[1], h[2], h[3])
        return words[1].to(tl.float32) * (tl.sum(total, 2) * BACK - 16 * x_sum)
    else:
        low, high = dot_nibbles(zero, zero, quants, a[0], a[1], a[2], a[3], h[0], h[1], h[2], h[3])
        total = tl.sum(low + high, 2) * BACK
        if FORMAT == "Q4_0":
            return words[1].to(tl.float32) * (total - 8 * x_sum)
        else:
            return words[1].to(tl.float32) * total + words[2].to(tl.float32) * x_sum


@triton.jit
def fifth_bits(bits):
    """Bits 0 … 3 to bit 4 of bytes 0 … 3."""
    return (bits & 1) << 4 | (bits & 2) << 11 | (bits & 4) << 18 | (bits & 8) << 25


@triton.jit
def fp4(word, SIGN: tl.constexpr, MAGNITUDE: tl.constexpr):
    """An e2m1 code as the float32 of 2^-126 times its value: its three bits are low exponent and high mantissa."""
    if MAGNITUDE >= 0:
        magnitude = word << MAGNITUDE
    else:
        magnitude = word >> -MAGNITUDE
    return (word << SIGN & 0x80000000 | magnitude & 0x01C00000).to(tl.float32, bitcast=True)


@triton.jit
def words_q8_0(buffer, origin, at, mask, P0: tl.constexpr, P1: tl.constexpr):
    """Twice four words [R, U, 4], and the scale [R, U]."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    spot = (origin[None, :] + P1 // 4 + at * 8)[:, :, None] + tl.arange(0, 4)[None, None, :]
    m = mask[:, :, None]
    d = buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + P0 // 2 + at
    return (tl.load(words + spot, mask=m, other=0), tl.load(words + spot + 4, mask=m, other=0),
            tl.load(d, mask=mask, other=0.0))  # fmt: skip


@triton.jit
def fold_q8_0(words, xs):
    """Signed bytes, read as unsigned ones that are 128 too large → [R, U]."""
    a, h = xs[0], xs[1]
    total = dot_bytes(tl.zeros(words[0].shape, tl.float32), words[0] ^ 0x80808080, a[0], a[1], a[2], a[3])
    total = dot_bytes(total, words[1] ^ 0x80808080, h[0], h[1], h[2], h[3])
    return words[2].to(tl.float32) * (tl.sum(total, 2) * BACK - (128 * xs[2])[None])


@triton.jit
def words_float(buffer, origin, at, mask, FORMAT: tl.constexpr, P0: tl.constexpr):
    """F32, F16 and BF16, 32 weights a unit: [R, U, 32]."""
    m, i = mask[:, :, None], tl.arange(0, 32)[None, None, :]
    if FORMAT == "F32":
        spot = (origin[None, :] + P0 // 4 + at * 32)[:, :, None] + i
        return (tl.load(buffer.to(tl.pointer_type(tl.float32)) + spot, mask=m, other=0.0),)
    else:
        spot = (origin[None, :] * 2 + P0 // 2 + at * 32)[:, :, None] + i
        return (tl.load(buffer.to(tl.pointer_type(tl.uint16)) + spot, mask=m, other=0),)


@triton.jit
def fold_float(words, xs, FORMAT: tl.constexpr):
    """[R, U]. BF16 by its bits: the interpreter has bfloat16 wrong."""
    if FORMAT == "F32":
        weights = words[0]
    elif FORMAT == "F16":
        weights = words[0].to(tl.float16, bitcast=True).to(tl.float32)
    else:
        weights = (words[0].to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.sum(weights * xs[0][None], 2)


@triton.jit
def x_of(x, norm, base, start, there, FORMAT: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr):
    """What a format's rows are multiplied with, in registers: of striped vectors of K float32 those values that stand
    from `start` [U] of the vector at `base` [U] on, a unit each; 0 where not `there` [U]."""
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        return x_k(x, norm, base, start, there, K, NORM)
    elif FORMAT == "Q6_K":
        return x_q6_k(x, norm, base, start, there, K, NORM)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        at = place(start[:, None] + tl.arange(0, 32)[None, :], K)
        return (load_x(x, norm, base[:, None], at, there[:, None], NORM),)
    else:
        return x_32(x, norm, base, start, there, K, NORM)


@triton.jit
def words_of(buffer, origin, at, mask, FORMAT: tl.constexpr,
             P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """What the file has of a tile, nothing worked out yet; 0 where masked.

    buffer: uint8; `origin` [U] the word at which the matrix of each unit starts; `at` [R, U] the unit's index in its
    matrix (row · units a row + unit).
    """
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        return words_k(buffer, origin, at, mask, FORMAT == "Q5_K", P0)
    elif FORMAT == "Q6_K":
        return words_q6_k(buffer, origin, at, mask, P0, P1, P2, P3)
    elif FORMAT == "Q8_0":
        return words_q8_0(buffer, origin, at, mask, P0, P1)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        return words_float(buffer, origin, at, mask, FORMAT, P0)
    else:
        return words_small(buffer, origin, at, mask, FORMAT, P0, P1, P2)


@triton.jit
def fold(words, xs, FORMAT: tl.constexpr):
    """Rows times x over one tile of units → [R]."""
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        return tl.sum(tl.sum(fold_k(words, xs, FORMAT == "Q5_K"), 2), 1)
    elif FORMAT == "Q6_K":
        return tl.sum(tl.sum(fold_q6_k(words, xs), 2), 1)
    elif FORMAT == "Q8_0":
        return tl.sum(fold_q8_0(words, xs), 1)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        return tl.sum(fold_float(words, xs, FORMAT), 1)
    else:
        return tl.sum(fold_small(words, xs, FORMAT), 1)
