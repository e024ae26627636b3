"""Dot products of quantised rows with a float32 vector, a format a function: the inner part of every GEMV.

A tile is R rows × U units; a unit is a block of 256 weights, or one of 32. Weights are never turned into floats one by
one: integer instructions run at half the rate of FMA, and int → float conversion at an eighth. A code of n bits at bit
p of a word, the others masked off, *is* a float32: the subnormal q · 2^(p - 149). Multiplied by x · 2^(100 - p) it
gives q · x · 2^-49 exactly; the sum of a group is scaled back together with the group's own scale. So a weight costs
one AND and one FMA. Scales are applied to a group's sum, minima to the sum of its x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.formats import FORMATS

BACK = tl.constexpr(2.0**49)
# Weights a unit: a block of 256, or one of 32; 32 of a float format.
UNIT = {name: max(32, form.block) for name, form in FORMATS.items()}


@triton.jit
def place(i, K: tl.constexpr):
    """Where value i of an activation of K values stands: see kernels.striped."""
    if K % 64 == 0:
        return i % 64 * (K // 64) + i // 64
    else:
        return i


@triton.jit
def load_x(x, norm, base, first, p, factor, mask, K: tl.constexpr, NORM: tl.constexpr):
    """Of the vector at `base` of x: p values behind the one that stands at `first`, within its lane's 64; times the
    norm's weight, times a factor."""
    at = first + p * (K // 64 if K % 64 == 0 else 1)
    value = tl.load(x + base + at, mask=mask, other=0.0)
    if NORM:
        value = value * tl.load(norm + at, mask=mask, other=0.0)
    return value * factor


@triton.jit
def load_4(x, norm, base, first, p, factor, mask, K: tl.constexpr, NORM: tl.constexpr):
    """Four neighbours from p on."""
    return (load_x(x, norm, base, first, p, factor, mask, K, NORM),
            load_x(x, norm, base, first, p + 1, factor, mask, K, NORM),
            load_x(x, norm, base, first, p + 2, factor, mask, K, NORM),
            load_x(x, norm, base, first, p + 3, factor, mask, K, NORM))  # fmt: skip


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
def dot_k(buffer, origin, at, mask, x, norm, base, start, factor,
          FIVE: tl.constexpr, P0: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Q4_K and Q5_K → [R, U, 4]. A lane has 32 bytes of quants: two groups of 32 weights, their scales read once."""
    SIZE: tl.constexpr = 44 if FIVE else 36
    words = buffer.to(tl.pointer_type(tl.uint32))
    head = origin[None, :] + (P0 // 4) + at * SIZE  # [R, U]
    j, w = tl.arange(0, 4), tl.arange(0, 4)
    spot = head[:, :, None, None] + (SIZE - 32) + (j[:, None] * 8 + w[None, :])[None, None]
    m4 = mask[:, :, None, None]
    first = tl.load(words + spot, mask=m4, other=0)  # [R, U, 4, 4]
    second = tl.load(words + spot + 4, mask=m4, other=0)
    h0 = tl.load(words + head, mask=mask, other=0)[:, :, None]
    h1 = tl.load(words + head + 1, mask=mask, other=0)[:, :, None]
    h2 = tl.load(words + head + 2, mask=mask, other=0)[:, :, None]
    h3 = tl.load(words + head + 3, mask=mask, other=0)[:, :, None]
    at_lane = place(start[:, None] + j[None, :] * 64, K)[:, :, None]  # [U, 4, 1]
    p = (w * 4)[None, None, :]
    b, f, m = base[:, None, None], factor[:, None, None], (factor != 0)[:, None, None]
    l0, l1, l2, l3 = load_4(x, norm, b, at_lane, p, f, m, K, NORM)
    k0, k1, k2, k3 = load_4(x, norm, b, at_lane, p + 16, f, m, K, NORM)
    g0, g1, g2, g3 = load_4(x, norm, b, at_lane, p + 32, f, m, K, NORM)
    n0, n1, n2, n3 = load_4(x, norm, b, at_lane, p + 48, f, m, K, NORM)
    x_low = tl.sum((l0 + l1) + (l2 + l3) + ((k0 + k1) + (k2 + k3)), 2)[None]  # [1, U, 4]
    x_high = tl.sum((g0 + g1) + (g2 + g3) + ((n0 + n1) + (n2 + n3)), 2)[None]
    fifth, fifth_second = first, second
    if FIVE:
        bits = head[:, :, None, None] + 4 + w[None, None, None, :]
        shift = (2 * j)[None, None, :, None]
        fifth = tl.load(words + bits, mask=m4, other=0) >> shift
        fifth_second = tl.load(words + bits + 4, mask=m4, other=0) >> shift
    zero = tl.zeros(first.shape, tl.float32)
    low, high = k_words(zero, zero, first, fifth, l0, l1, l2, l3, g0, g1, g2, g3, FIVE)
    low, high = k_words(low, high, second, fifth_second, k0, k1, k2, k3, n0, n1, n2, n3, FIVE)
    low, high = tl.sum(low, 3), tl.sum(high, 3)
    scale, minimum = k_scales(h1, h2, h3, j[None, None, :])
    scaled = code(scale, 0xFF) * (low * 2.0**100) + code(scale, 0xFF00) * (high * 2.0**92)  # · 2^-98
    lowered = code(minimum, 0xFF) * (x_low * 2.0**100) + code(minimum, 0xFF00) * (x_high * 2.0**92)  # · 2^-49
    return half_of(h0, False) * 2.0**98 * scaled - half_of(h0, True) * BACK * lowered


@triton.jit
def dot_q6_k(buffer, origin, at, mask, x, norm, base, start, factor,
             P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
             K: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Planes: 128 bytes of low nibbles, 64 of upper bits, 16 scales, 1 float16 → [R, U, 4]; four sixteens a lane."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    j, w = tl.arange(0, 4), tl.arange(0, 4)  # j = 2 half + part
    half, part = j // 2, j % 2
    m4, origin4 = mask[:, :, None, None], origin[None, :, None, None]
    low_spot = origin4 + P0 // 4 + at[:, :, None, None] * 32 + (j[:, None] * 8 + w[None, :])[None, None]
    high_spot = origin4 + P1 // 4 + at[:, :, None, None] * 16 + (half[:, None] * 8 + w[None, :])[None, None]
    shift = (2 * part)[None, None, :, None]
    begin = start[:, None] + (half * 128 + part * 32)[None, :]
    low_lane, high_lane = place(begin, K)[:, :, None], place(begin + 64, K)[:, :, None]
    p = (w * 4)[None, None, :]
    b, f, m = base[:, None, None], factor[:, None, None], (factor != 0)[:, None, None]
    scales = buffer.to(tl.pointer_type(tl.int8)) + origin[None, :, None] * 4 + P2 + at[:, :, None] * 16
    scales += (half * 8 + part * 2)[None, None]
    m3 = mask[:, :, None]
    total = tl.zeros(mask.shape, tl.float32)[:, :, None] + tl.zeros((4,), tl.float32)[None, None]
    for s in tl.static_range(2):
        nibbles = tl.load(words + low_spot + 4 * s, mask=m4, other=0)
        crumbs = tl.load(words + high_spot + 4 * s, mask=m4, other=0) >> shift
        zero = tl.zeros(nibbles.shape, tl.float32)
        l0, l1, l2, l3 = load_4(x, norm, b, low_lane, p + 16 * s, f, m, K, NORM)
        h0, h1, h2, h3 = load_4(x, norm, b, high_lane, p + 16 * s, f, m, K, NORM)
        low = tl.sum(dot_bytes(zero, nibbles & 0x0F0F0F0F | (crumbs & 0x03030303) << 4, l0, l1, l2, l3), 3) * BACK
        high = tl.sum(dot_bytes(zero, nibbles >> 4 & 0x0F0F0F0F | crumbs & 0x30303030, h0, h1, h2, h3), 3) * BACK
        low -= 32 * tl.sum((l0 + l1) + (l2 + l3), 2)[None]
        high -= 32 * tl.sum((h0 + h1) + (h2 + h3), 2)[None]
        total += low * tl.load(scales + s, mask=m3, other=0).to(tl.float32)
        total += high * tl.load(scales + 4 + s, mask=m3, other=0).to(tl.float32)
    d = tl.load(buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + P3 // 2 + at, mask=mask, other=0.0)
    return d.to(tl.float32)[:, :, None] * total


@triton.jit
def dot_small(buffer, origin, at, mask, x, norm, base, start, factor, FORMAT: tl.constexpr,
              P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Blocks of 32 in nibbles: Q4_0, Q4_1, Q5_0, MXFP4 → [R, U]."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    w = tl.arange(0, 4)
    QUANTS: tl.constexpr = P1 if (FORMAT == "Q4_0" or FORMAT == "MXFP4") else P2
    spot = (origin[None, :] + QUANTS // 4 + at * 4)[:, :, None] + w[None, None, :]
    quants = tl.load(words + spot, mask=mask[:, :, None], other=0)  # [R, U, 4]
    lane, p = place(start, K)[:, None], (w * 4)[None, :]
    b, f, m = base[:, None], factor[:, None], (factor != 0)[:, None]
    l0, l1, l2, l3 = load_4(x, norm, b, lane, p, f, m, K, NORM)
    h0, h1, h2, h3 = load_4(x, norm, b, lane, p + 16, f, m, K, NORM)
    if FORMAT == "MXFP4":
        total = (fp4(quants, 28, 22) * (l0 * 2.0**63)[None] + fp4(quants, 20, 14) * (l1 * 2.0**63)[None]
                 + fp4(quants, 12, 6) * (l2 * 2.0**63)[None] + fp4(quants, 4, -2) * (l3 * 2.0**63)[None]
                 + fp4(quants, 24, 18) * (h0 * 2.0**63)[None] + fp4(quants, 16, 10) * (h1 * 2.0**63)[None]
                 + fp4(quants, 8, 2) * (h2 * 2.0**63)[None] + fp4(quants, 0, -6) * (h3 * 2.0**63)[None])  # fmt: skip
        exponent = tl.load(buffer + origin[None, :] * 4 + P0 + at, mask=mask, other=0).to(tl.uint32)
        scale = tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
        return tl.sum(total, 2) * 2.0**63 * scale
    halves = buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + at
    d = tl.load(halves + P0 // 2, mask=mask, other=0.0).to(tl.float32)
    x_sum = tl.sum((l0 + l1) + (l2 + l3) + ((h0 + h1) + (h2 + h3)), 1)[None]
    if FORMAT == "Q5_0":
        bits = tl.load(words + origin[None, :] + P1 // 4 + at, mask=mask, other=0)[:, :, None]
        first = bits >> (4 * w)[None, None, :]
        total = dot_bytes(tl.zeros(quants.shape, tl.float32), quants & 0x0F0F0F0F | fifth_bits(first), l0, l1, l2, l3)
        total = dot_bytes(total, quants >> 4 & 0x0F0F0F0F | fifth_bits(first >> 16), h0, h1, h2, h3)
        return d * (tl.sum(total, 2) * BACK - 16 * x_sum)
    zero = tl.zeros(quants.shape, tl.float32)
    low, high = dot_nibbles(zero, zero, quants, l0, l1, l2, l3, h0, h1, h2, h3)
    total = tl.sum(low + high, 2) * BACK
    if FORMAT == "Q4_0":
        return d * (total - 8 * x_sum)
    return d * total + tl.load(halves + P1 // 2, mask=mask, other=0.0).to(tl.float32) * x_sum


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
def dot_q8_0(buffer, origin, at, mask, x, norm, base, start, factor,
             P0: tl.constexpr, P1: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Signed bytes, read as unsigned ones that are 128 too large → [R, U]; a block a lane."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    w = tl.arange(0, 4)
    spot = (origin[None, :] + P1 // 4 + at * 8)[:, :, None] + w[None, None, :]
    lane, p = place(start, K)[:, None], (w * 4)[None, :]
    b, f, m = base[:, None], factor[:, None], (factor != 0)[:, None]
    m3 = mask[:, :, None]
    x0, x1, x2, x3 = load_4(x, norm, b, lane, p, f, m, K, NORM)
    y0, y1, y2, y3 = load_4(x, norm, b, lane, p + 16, f, m, K, NORM)
    first = tl.load(words + spot, mask=m3, other=0) ^ 0x80808080
    second = tl.load(words + spot + 4, mask=m3, other=0) ^ 0x80808080
    total = dot_bytes(tl.zeros(first.shape, tl.float32), first, x0, x1, x2, x3)
    total = dot_bytes(total, second, y0, y1, y2, y3)
    x_sum = tl.sum((x0 + x1) + (x2 + x3) + ((y0 + y1) + (y2 + y3)), 1)[None]
    d = tl.load(buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + P0 // 2 + at, mask=mask, other=0.0)
    return d.to(tl.float32) * (tl.sum(total, 2) * BACK - 128 * x_sum)


@triton.jit
def dot_float(buffer, origin, at, mask, x, norm, base, start, factor, FORMAT: tl.constexpr,
              P0: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """F32, F16 and BF16, 32 weights a unit → [R, U]."""
    m3 = mask[:, :, None]
    i = tl.arange(0, 32)
    if FORMAT == "F32":
        spot = (origin[None, :] + P0 // 4 + at * 32)[:, :, None] + i[None, None, :]
        weights = tl.load(buffer.to(tl.pointer_type(tl.float32)) + spot, mask=m3, other=0.0)
    elif FORMAT == "F16":
        spot = (origin[None, :] * 2 + P0 // 2 + at * 32)[:, :, None] + i[None, None, :]
        weights = tl.load(buffer.to(tl.pointer_type(tl.float16)) + spot, mask=m3, other=0.0).to(tl.float32)
    else:  # by its bits: the interpreter has bfloat16 wrong
        spot = (origin[None, :] * 2 + P0 // 2 + at * 32)[:, :, None] + i[None, None, :]
        bits = tl.load(buffer.to(tl.pointer_type(tl.uint16)) + spot, mask=m3, other=0).to(tl.uint32)
        weights = (bits << 16).to(tl.float32, bitcast=True)
    m = (factor != 0)[:, None]
    values = load_x(x, norm, base[:, None], place(start, K)[:, None], i[None, :], factor[:, None], m, K, NORM)
    return tl.sum(weights * values[None], 2)


@triton.jit
def dot(buffer, origin, at, mask, x, norm, base, start, factor, FORMAT: tl.constexpr,
        P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
        K: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Rows times x over one tile of units → [R].

    buffer: uint8; `origin` [U] the word at which the matrix of each unit starts; `at` [R, U] the unit's index in its
    matrix (row · units a row + unit). x: striped vectors of K float32; a unit's values are those from `start` [U] of
    the vector at `base` [U], times `factor` [U]; where that is 0, x is not read.
    """
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        sums = dot_k(buffer, origin, at, mask, x, norm, base, start, factor, FORMAT == "Q5_K", P0, K, NORM)
        return tl.sum(tl.sum(sums, 2), 1)
    elif FORMAT == "Q6_K":
        sums = dot_q6_k(buffer, origin, at, mask, x, norm, base, start, factor, P0, P1, P2, P3, K, NORM)
        return tl.sum(tl.sum(sums, 2), 1)
    elif FORMAT == "Q8_0":
        return tl.sum(dot_q8_0(buffer, origin, at, mask, x, norm, base, start, factor, P0, P1, K, NORM), 1)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        return tl.sum(dot_float(buffer, origin, at, mask, x, norm, base, start, factor, FORMAT, P0, K, NORM), 1)
    else:
        return tl.sum(dot_small(buffer, origin, at, mask, x, norm, base, start, factor, FORMAT, P0, P1, P2, K, NORM), 1)
