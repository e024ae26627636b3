"""Dot products of quantised rows with a float32 vector, a format a function: the inner part of every GEMV.

A tile is R rows × U units; a unit is a block of 256 weights, or one of 32. Weights are never turned into floats one by
one: integer instructions run at half the rate of FMA, and int → float conversion at an eighth. A code of n bits at bit
p of a word, the others masked off, *is* a float32: the subnormal q · 2^(p - 149). Multiplied by x · 2^(100 - p) it gives
q · x · 2^-49 exactly; the sum of a group is scaled back together with the group's own scale. So a weight costs one AND
and one FMA. Scales are applied to a group's sum, minima to the sum of its x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.formats import FORMATS

BACK = tl.constexpr(2.0**49)
# Weights a unit, and words of quants in it, by format; a unit of a float format is 32 weights too.
UNIT = {name: max(32, form.block) for name, form in FORMATS.items()}
WORDS = {"Q4_K": 32, "Q5_K": 32, "Q6_K": 32, "Q4_0": 4, "Q4_1": 4, "Q5_0": 4, "MXFP4": 4, "Q8_0": 8,
         "F32": 32, "F16": 16, "BF16": 16}  # fmt: skip


@triton.jit
def load_x(x, norm, i, factor, mask, NORM: tl.constexpr):
    """x at i, times the norm's weight at i, times a factor."""
    value = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        value = value * tl.load(norm + i, mask=mask, other=0.0).to(tl.float32)
    return value * factor


@triton.jit
def code(word, MASK: tl.constexpr):
    """The bits of MASK as the subnormal float that they are."""
    return (word & MASK).to(tl.float32, bitcast=True)


@triton.jit
def dot_nibbles(word, l0, l1, l2, l3, h0, h1, h2, h3):
    """Σ of a word's 8 nibbles times x, · 2^-49: low nibbles of its bytes times l, high ones times h.

    The x come scaled: see scale_nibbles.
    """
    top = word >> 20
    low = code(word, 0xF) * l0 + code(word, 0xF00) * l1 + code(word, 0xF0000) * l2 + code(top, 0xF0) * l3
    high = code(word, 0xF0) * h0 + code(word, 0xF000) * h1 + code(top, 0xF) * h2 + code(top, 0xF00) * h3
    return low, high


@triton.jit
def dot_bytes(word, x0, x1, x2, x3):
    """Σ of a word's 4 unsigned bytes times x, · 2^-49; x1 and x3 come scaled by 2^92, x0 and x2 by 2^100."""
    top = word >> 16
    return code(word, 0xFF) * x0 + code(word, 0xFF00) * x1 + code(top, 0xFF) * x2 + code(top, 0xFF00) * x3


@triton.jit
def k_scale(h1, h2, h3, group):
    """Scale and minimum (whole numbers) of a group 0 … 7 out of the 12 bytes of Q4_K and Q5_K; see formats.k_scales."""
    shift = (group & 3) * 8
    scale, minimum = h1 >> shift, h2 >> shift
    rest = h3 >> shift
    late = group >= 4
    scale = tl.where(late, rest & 15 | scale >> 2 & 48, scale & 63)
    minimum = tl.where(late, rest >> 4 & 15 | minimum >> 2 & 48, minimum & 63)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def half_of(word, HIGH: tl.constexpr):
    """One of the two float16 in a word."""
    bits = (word >> 16 if HIGH else word & 0xFFFF).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dot_k(buffer, origin, at, mask, x, norm, start, factor, FIVE: tl.constexpr, P0: tl.constexpr, NORM: tl.constexpr):
    """Q4_K and Q5_K: `at` [R, U] blocks of a matrix at word `origin` [U]; x from `start` [U] → [R, U, 4]."""
    SIZE: tl.constexpr = 44 if FIVE else 36
    words = buffer.to(tl.pointer_type(tl.uint32))
    head = origin[None, :] + (P0 // 4) + at * SIZE  # [R, U]
    j, w = tl.arange(0, 4), tl.arange(0, 8)
    place = head[:, :, None, None] + (SIZE - 32) + (j[:, None] * 8 + w[None, :])[None, None]
    quants = tl.load(words + place, mask=mask[:, :, None, None], other=0)  # [R, U, 4, 8]
    h0 = tl.load(words + head, mask=mask, other=0)[:, :, None]
    h1 = tl.load(words + head + 1, mask=mask, other=0)[:, :, None]
    h2 = tl.load(words + head + 2, mask=mask, other=0)[:, :, None]
    h3 = tl.load(words + head + 3, mask=mask, other=0)[:, :, None]
    i = start[:, None, None] + j[None, :, None] * 64 + w[None, None, :] * 4  # [U, 4, 8]
    f, m = factor[:, None, None], (factor != 0)[:, None, None]
    l0 = load_x(x, norm, i, f, m, NORM)
    l1 = load_x(x, norm, i + 1, f, m, NORM)
    l2 = load_x(x, norm, i + 2, f, m, NORM)
    l3 = load_x(x, norm, i + 3, f, m, NORM)
    g0 = load_x(x, norm, i + 32, f, m, NORM)
    g1 = load_x(x, norm, i + 33, f, m, NORM)
    g2 = load_x(x, norm, i + 34, f, m, NORM)
    g3 = load_x(x, norm, i + 35, f, m, NORM)
    x_low = tl.sum(l0 + l1 + l2 + l3, 2)[None]  # [1, U, 4]
    x_high = tl.sum(g0 + g1 + g2 + g3, 2)[None]
    if FIVE:
        fifth = tl.load(words + head[:, :, None, None] + 4 + w[None, None, None, :], mask=mask[:, :, None, None],
                        other=0) >> (2 * j)[None, None, :, None]  # fmt: skip
        low = dot_bytes(quants & 0x0F0F0F0F | (fifth & 0x01010101) << 4,
                        (l0 * 2.0**100)[None], (l1 * 2.0**92)[None], (l2 * 2.0**100)[None], (l3 * 2.0**92)[None])  # fmt: skip
        high = dot_bytes(quants >> 4 & 0x0F0F0F0F | (fifth & 0x02020202) << 3,
                         (g0 * 2.0**100)[None], (g1 * 2.0**92)[None], (g2 * 2.0**100)[None], (g3 * 2.0**92)[None])  # fmt: skip
    else:
        low, high = dot_nibbles(
            quants, (l0 * 2.0**100)[None], (l1 * 2.0**92)[None], (l2 * 2.0**84)[None], (l3 * 2.0**96)[None],
            (g0 * 2.0**96)[None], (g1 * 2.0**88)[None], (g2 * 2.0**100)[None], (g3 * 2.0**92)[None],
        )  # fmt: skip
    low, high = tl.sum(low, 3) * BACK, tl.sum(high, 3) * BACK  # [R, U, 4]
    s_low, m_low = k_scale(h1, h2, h3, (2 * j)[None, None, :])
    s_high, m_high = k_scale(h1, h2, h3, (2 * j + 1)[None, None, :])
    scaled = half_of(h0, False) * (low * s_low + high * s_high)
    return scaled - half_of(h0, True) * (m_low * x_low + m_high * x_high)


@triton.jit
def dot_q6_k(buffer, origin, at, mask, x, norm, start, factor,
             P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Planes: 128 bytes of low nibbles, 64 of upper bits, 16 scales, 1 float16 → [R, U, 8] by pairs of 16 weights."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    g, w = tl.arange(0, 8), tl.arange(0, 4)  # g = 4 half + 2 part + sixteen
    half, part, sixteen = g // 4, g // 2 % 2, g % 2
    base = origin[None, :, None, None]
    low_place = base + P0 // 4 + at[:, :, None, None] * 32 + (g[:, None] * 4 + w[None, :])[None, None]
    high_word = (half * 8 + sixteen * 4)[:, None] + w[None, :]
    high_place = base + P1 // 4 + at[:, :, None, None] * 16 + high_word[None, None]
    m4 = mask[:, :, None, None]
    nibbles = tl.load(words + low_place, mask=m4, other=0)
    crumbs = tl.load(words + high_place, mask=m4, other=0) >> (2 * part)[None, None, :, None]
    i = start[:, None, None] + (half * 128 + part * 32 + sixteen * 16)[None, :, None] + w[None, None, :] * 4
    f, m = factor[:, None, None], (factor != 0)[:, None, None]
    l0 = load_x(x, norm, i, f, m, NORM)
    l1 = load_x(x, norm, i + 1, f, m, NORM)
    l2 = load_x(x, norm, i + 2, f, m, NORM)
    l3 = load_x(x, norm, i + 3, f, m, NORM)
    h0 = load_x(x, norm, i + 64, f, m, NORM)
    h1 = load_x(x, norm, i + 65, f, m, NORM)
    h2 = load_x(x, norm, i + 66, f, m, NORM)
    h3 = load_x(x, norm, i + 67, f, m, NORM)
    x_low, x_high = tl.sum(l0 + l1 + l2 + l3, 2)[None], tl.sum(h0 + h1 + h2 + h3, 2)[None]
    low = dot_bytes(nibbles & 0x0F0F0F0F | (crumbs & 0x03030303) << 4,
                    (l0 * 2.0**100)[None], (l1 * 2.0**92)[None], (l2 * 2.0**100)[None], (l3 * 2.0**92)[None])  # fmt: skip
    high = dot_bytes(nibbles >> 4 & 0x0F0F0F0F | crumbs & 0x30303030,
                     (h0 * 2.0**100)[None], (h1 * 2.0**92)[None], (h2 * 2.0**100)[None], (h3 * 2.0**92)[None])  # fmt: skip
    low, high = tl.sum(low, 3) * BACK - 32 * x_low, tl.sum(high, 3) * BACK - 32 * x_high
    scales = buffer.to(tl.pointer_type(tl.int8))
    scale_place = (origin[None, :, None] * 4 + P2 + at[:, :, None] * 16) + (half * 8 + part * 2 + sixteen)[None, None]
    m3 = mask[:, :, None]
    s_low = tl.load(scales + scale_place, mask=m3, other=0).to(tl.float32)
    s_high = tl.load(scales + scale_place + 4, mask=m3, other=0).to(tl.float32)
    d = tl.load(buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + P3 // 2 + at, mask=mask, other=0.0)
    return d.to(tl.float32)[:, :, None] * (low * s_low + high * s_high)


@triton.jit
def dot_small(buffer, origin, at, mask, x, norm, start, factor, FORMAT: tl.constexpr,
              P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Blocks of 32 in nibbles: Q4_0, Q4_1, Q5_0, MXFP4 → [R, U]."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    w = tl.arange(0, 4)
    QUANTS: tl.constexpr = P1 if (FORMAT == "Q4_0" or FORMAT == "MXFP4") else P2
    place = (origin[None, :] + QUANTS // 4 + at * 4)[:, :, None] + w[None, None, :]
    quants = tl.load(words + place, mask=mask[:, :, None], other=0)  # [R, U, 4]
    i = start[:, None] + w[None, :] * 4
    f, m = factor[:, None], (factor != 0)[:, None]
    l0 = load_x(x, norm, i, f, m, NORM)
    l1 = load_x(x, norm, i + 1, f, m, NORM)
    l2 = load_x(x, norm, i + 2, f, m, NORM)
    l3 = load_x(x, norm, i + 3, f, m, NORM)
    h0 = load_x(x, norm, i + 16, f, m, NORM)
    h1 = load_x(x, norm, i + 17, f, m, NORM)
    h2 = load_x(x, norm, i + 18, f, m, NORM)
    h3 = load_x(x, norm, i + 19, f, m, NORM)
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
    x_sum = tl.sum(l0 + l1 + l2 + l3 + h0 + h1 + h2 + h3, 1)[None]
    if FORMAT == "Q5_0":
        bits = tl.load(words + origin[None, :] + P1 // 4 + at, mask=mask, other=0)[:, :, None]
        first = bits >> (4 * w)[None, None, :]
        low = dot_bytes(quants & 0x0F0F0F0F | fifth_bits(first),
                        (l0 * 2.0**100)[None], (l1 * 2.0**92)[None], (l2 * 2.0**100)[None], (l3 * 2.0**92)[None])  # fmt: skip
        high = dot_bytes(quants >> 4 & 0x0F0F0F0F | fifth_bits(first >> 16),
                         (h0 * 2.0**100)[None], (h1 * 2.0**92)[None], (h2 * 2.0**100)[None], (h3 * 2.0**92)[None])  # fmt: skip
        return d * (tl.sum(low + high, 2) * BACK - 16 * x_sum)
    low, high = dot_nibbles(
        quants, (l0 * 2.0**100)[None], (l1 * 2.0**92)[None], (l2 * 2.0**84)[None], (l3 * 2.0**96)[None],
        (h0 * 2.0**96)[None], (h1 * 2.0**88)[None], (h2 * 2.0**100)[None], (h3 * 2.0**92)[None],
    )  # fmt: skip
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
def dot_q8_0(buffer, origin, at, mask, x, norm, start, factor,
             P0: tl.constexpr, P1: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Signed bytes, read as unsigned ones that are 128 too large → [R, U]."""
    words = buffer.to(tl.pointer_type(tl.uint32))
    w = tl.arange(0, 8)
    place = (origin[None, :] + P1 // 4 + at * 8)[:, :, None] + w[None, None, :]
    quants = tl.load(words + place, mask=mask[:, :, None], other=0) ^ 0x80808080
    i = start[:, None] + w[None, :] * 4
    f, m = factor[:, None], (factor != 0)[:, None]
    x0 = load_x(x, norm, i, f, m, NORM)
    x1 = load_x(x, norm, i + 1, f, m, NORM)
    x2 = load_x(x, norm, i + 2, f, m, NORM)
    x3 = load_x(x, norm, i + 3, f, m, NORM)
    total = dot_bytes(quants, (x0 * 2.0**100)[None], (x1 * 2.0**92)[None], (x2 * 2.0**100)[None], (x3 * 2.0**92)[None])
    d = tl.load(buffer.to(tl.pointer_type(tl.float16)) + origin[None, :] * 2 + P0 // 2 + at, mask=mask, other=0.0)
    return d.to(tl.float32) * (tl.sum(total, 2) * BACK - 128 * tl.sum(x0 + x1 + x2 + x3, 1)[None])


@triton.jit
def dot_float(buffer, origin, at, mask, x, norm, start, factor, FORMAT: tl.constexpr,
              P0: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """F32, F16 and BF16, 32 weights a unit → [R, U]."""
    m3 = mask[:, :, None]
    i = tl.arange(0, 32)
    if FORMAT == "F32":
        place = (origin[None, :] + P0 // 4 + at * 32)[:, :, None] + i[None, None, :]
        weights = tl.load(buffer.to(tl.pointer_type(tl.float32)) + place, mask=m3, other=0.0)
    elif FORMAT == "F16":
        place = (origin[None, :] * 2 + P0 // 2 + at * 32)[:, :, None] + i[None, None, :]
        weights = tl.load(buffer.to(tl.pointer_type(tl.float16)) + place, mask=m3, other=0.0).to(tl.float32)
    else:  # by its bits: the interpreter has bfloat16 wrong
        place = (origin[None, :] * 2 + P0 // 2 + at * 32)[:, :, None] + i[None, None, :]
        bits = tl.load(buffer.to(tl.pointer_type(tl.uint16)) + place, mask=m3, other=0).to(tl.uint32)
        weights = (bits << 16).to(tl.float32, bitcast=True)
    values = load_x(x, norm, start[:, None] + i[None, :], factor[:, None], (factor != 0)[:, None], NORM)
    return tl.sum(weights * values[None], 2)


@triton.jit
def dot(buffer, origin, at, mask, x, norm, start, factor, FORMAT: tl.constexpr,
        P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Rows times x over one tile of units → [R].

    buffer: uint8; `origin` [U] the word at which the matrix of each unit starts; `at` [R, U] the unit's index in its
    matrix (row · units a row + unit); x [·] float32 from `start` [U], times `factor` [U]; factor 0 is not read.
    """
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        sums = dot_k(buffer, origin, at, mask, x, norm, start, factor, FORMAT == "Q5_K", P0, NORM)
        return tl.sum(tl.sum(sums, 2), 1)
    elif FORMAT == "Q6_K":
        sums = dot_q6_k(buffer, origin, at, mask, x, norm, start, factor, P0, P1, P2, P3, NORM)
        return tl.sum(tl.sum(sums, 2), 1)
    elif FORMAT == "Q8_0":
        return tl.sum(dot_q8_0(buffer, origin, at, mask, x, norm, start, factor, P0, P1, NORM), 1)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        return tl.sum(dot_float(buffer, origin, at, mask, x, norm, start, factor, FORMAT, P0, NORM), 1)
    else:
        return tl.sum(dot_small(buffer, origin, at, mask, x, norm, start, factor, FORMAT, P0, P1, P2, NORM), 1)
