"""Quantised weights as floats, 64 columns of some rows at a time: for the grouped GEMM and for whole matrices.

Codes are brought into the bytes of words, four at a time; a byte becomes a float32 with one permutation of bytes and
one subtraction; conversion proper runs at an eighth of the rate. All products of codes with scales are exact in
float32, so contraction to FMA changes no bit. What is smaller than a word, scales, is read as the word that holds it:
Triton reads only words ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.bits import four, fp4, half_of, in_order, iq4, number
from offmoe.kernels.gpu.dot_32 import fifth_bits
from offmoe.kernels.gpu.dot_256 import k_scales
from offmoe.kernels.gpu.dot_crumbs import q3_scales
from offmoe.kernels.gpu.dot_int4 import has_zeros, is_int4, scale_of, sharing
from offmoe.kernels.gpu.dot_scaled import fp8, in_tiles, is_f8, scale_at
from offmoe.kernels.gpu.gemv import planes
from offmoe.kernels.planes import Matrix

STEP = 64  # columns of a tile


@triton.jit
def words_from(address, word, mask):
    return tl.load(address.to(tl.pointer_type(tl.uint32)) + word, mask=mask, other=0)


@triton.jit
def words_at(base, row, there, at, ROW: tl.constexpr, W: tl.constexpr):
    """The at-th W of ROW words a row, from `base` on: [R, W]. In one dimension, along which Triton lays neighbouring
    lanes; else it stores what comes of them 16 bits at a time."""
    word = at * W + tl.arange(0, W)
    return words_from((base + row * (ROW * 4))[:, None], word[None], there[:, None] & (word < ROW)[None])


@triton.jit
def double_from(address, at, mask):
    """Two words, the first one lower."""
    return tl.load(address.to(tl.pointer_type(tl.uint64)) + at, mask=mask, other=0)


@triton.jit
def halves_at(base, row, there, step, ROW: tl.constexpr):
    """The 16-bit numbers 2 · step and the next of ROW a row, as bits [R, 2]."""
    b = tl.arange(0, 2)[None]
    if ROW % 2 == 0:
        return (words_from(base, row * (ROW // 2) + step, there)[:, None] >> (16 * b)).to(tl.uint16)
    else:
        spot = base.to(tl.pointer_type(tl.uint16))[:, None] + (row * ROW)[:, None] + (step * 2 + b)
        return tl.load(spot, mask=there[:, None] & (step * 2 + b < ROW), other=0)


@triton.jit
def scales_at(base, row, there, step, ROW: tl.constexpr):
    return halves_at(base, row, there, step, ROW).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def bytes_at(base, row, there, step, ROW: tl.constexpr, N: tl.constexpr):
    """Likewise N bytes, two or four: uint32 [R, N]."""
    b = tl.arange(0, N)[None]
    if ROW % N == 0:
        at = row * ROW + step * N
        return words_from(base, at // 4, there)[:, None] >> (at % 4 * 8).to(tl.uint32)[:, None] >> (8 * b) & 0xFF
    else:
        spot = base[:, None] + (row * ROW)[:, None] + (step * N + b)
        return tl.load(spot, mask=there[:, None] & (step * N + b < ROW), other=0).to(tl.uint32)


@triton.jit
def in_halves(low, high, zero):
    """The bytes of `low` [R, G, W], then those of `high`, less `zero`: [R, G, 2, W, 2, 2]."""
    return four(tl.permute(tl.join(low, high), 0, 1, 3, 2), zero)


@triton.jit
def looked_up(first, last, zero, TURNS: tl.constexpr):
    """Of words [R, G, W] of nibbles, what a table has for their first four and their last four, less `zero`: nibbles
    as they lie, or low ones before high ones. [R, G, …]."""
    values = tl.join(four(first, zero), four(last, zero))  # byte's second bit, nibble, byte's first bit
    if TURNS:
        return tl.permute(values, 0, 1, 2, 5, 3, 4)
    else:
        return tl.permute(values, 0, 1, 4, 2, 5, 3)


@triton.jit
def tile_k(base, row, there, step, FIVE: tl.constexpr, COLS: tl.constexpr, P0: tl.constexpr):
    """Q4_K and Q5_K: low nibbles of 32 bytes, then the high ones."""
    SIZE: tl.constexpr = 176 if FIVE else 144
    head = base + P0 + row * (COLS // 256 * SIZE) + step // 4 * SIZE  # [R]
    j, g, i = step % 4, tl.arange(0, 2), tl.arange(0, 8)[None, None]
    h3, m3 = head[:, None, None], there[:, None, None]
    quants = words_from(h3, (SIZE // 4 - 32 + j * 8) + i, m3)  # [R, 1, 8]
    low, high = quants & 0x0F0F0F0F, quants >> 4 & 0x0F0F0F0F
    if FIVE:
        fifth = words_from(h3, 4 + i, m3) >> (2 * j)
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
def tile_q6_k(base, row, there, step, COLS: tl.constexpr,
              P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Four sixteens: low or high nibbles of 64 bytes, upper bits in 32."""
    BLOCKS: tl.constexpr = COLS // 256
    R: tl.constexpr = row.shape[0]
    block, part, g = row * BLOCKS + step // 4, step % 2, tl.arange(0, 4)
    low = tl.reshape(words_at(base + P0, row, there, step // 2, BLOCKS * 32, 16), (R, 2, 8))
    high = words_at(base + P1, row, there, step // 2, BLOCKS * 16, 8)[:, None, :]
    codes = low >> (4 * part) & 0x0F0F0F0F
    codes |= (high >> (4 * part + 2 * tl.arange(0, 2))[None, :, None] & 0x03030303) << 4
    scale = words_from(base + P2 + block * 16, step % 4, there)[:, None] >> (8 * g)[None]  # [R, 4]
    word = words_from(base + P3, block // 2, there) >> (block % 2 * 16).to(tl.uint32)
    scale = (number(scale & 0xFF ^ 0x80) - 128.0) * half_of(word, False)[:, None]
    return four(tl.reshape(codes, (R, 4, 4)), 32.0) * scale[:, :, None, None, None]


@triton.jit
def eight_words(address, there):
    """[R, 1, 8]. A slice [:, None, :] of [R, 8] would do, but that Triton takes it through shared memory."""
    return words_from(address[:, None, None], tl.arange(0, 8)[None, None], there[:, None, None])


@triton.jit
def tile_q2_k(base, row, there, step, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """Four sixteens: two bits of 32 bytes, then the next two."""
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
    """Likewise, with a third bit out of 32 bytes, which all eight such groups of a block share."""
    block, b, q, at = row * (COLS // 256) + step // 4, (8 * tl.arange(0, 4))[None], step % 4, step % 2 * 4
    words = eight_words(base + P1 + row * (COLS // 4) + step // 2 * 32, there)
    upper = eight_words(base + P0 + block * 32, there) >> q * 2
    scales = base + P2 + block * 12
    low, high = words_from(scales, q % 2, there) >> (q // 2 * 4), words_from(scales, 2, there) >> (q * 2)
    word = words_from(base + P3, block // 2, there) >> (block % 2 * 16).to(tl.uint32)
    scale = half_of(word, False)[:, None] * (number(q3_scales(low, high)[:, None] >> b & 0xFF) - 32.0)
    values = in_halves(words >> at & 0x03030303 | (upper & 0x01010101) << 2,
                       words >> at + 2 & 0x03030303 | (upper & 0x02020202) << 1, 4.0)  # fmt: skip
    return tl.reshape(values, (row.shape[0], 4, 16)) * scale[:, :, None]


@triton.jit
def tile_small(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr,
               P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Two blocks of 32 in nibbles: Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4 in both orders; a row's last may hold one."""
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
def tile_iq4_xs(base, row, there, step, COLS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Two groups of 32, low nibbles before high ones."""
    head, g, j = base + P0 + (row * (COLS // 256) + step // 4) * 8, tl.arange(0, 2), step % 4
    words = tl.reshape(words_at(base + P1, row, there, step, COLS // 8, 8), (row.shape[0], 2, 4))
    first, scales = words_from(head, 0, there), words_from(head, 1, there)
    scale = scales[:, None] >> (8 * j + 4 * g)[None] & 15 | (first[:, None] >> (16 + 4 * j + 2 * g)[None] & 3) << 4
    scale = half_of(first, False)[:, None] * (number(scale) - 32.0)  # [R, 2]
    return looked_up(iq4(words), iq4(words >> 16), 128.0, False) * scale[:, :, None, None, None, None]


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
        head = words_from(base + P0, group // 2, there)[:, None] >> (group % 2 * 16).to(tl.uint32)[:, None]
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
    """Within one tile's columns: 64 divides 128."""
    words = words_at(base + P1, row, there, step, COLS // 4, 16)
    at = row // 128 * ((COLS + 127) // 128) + step // 2 if in_tiles(FORMAT) else row
    values = in_order(fp8(words, 24, 20), fp8(words, 16, 12), fp8(words, 8, 4), fp8(words, 0, -4))
    return values * 2.0**120 * scale_at(base + P0, at, there, FORMAT)[:, None, None, None]


@triton.jit
def tile_nvfp4(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr,
               P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):  # fmt: skip
    """Four sixteens; the last tile of a row may hold two."""
    SIXTEENS: tl.constexpr = COLS // 16
    words = tl.reshape(words_at(base + P2, row, there, step, SIXTEENS * 2, 8), (row.shape[0], 4, 2))
    half = scale_at(base + P0, row, there, FORMAT)[:, None] * 0.5
    half *= fp8(bytes_at(base + P1, row, there, step, SIXTEENS, 4), 24, 20) * 2.0**120
    return looked_up(fp4(words), fp4(words >> 16), 16.0, True) * half[:, :, None, None, None, None]


@triton.jit
def tile_float(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr, P0: tl.constexpr):
    k = step * 64 + tl.arange(0, 64)
    mask = there[:, None] & (k < COLS)[None]
    if FORMAT == "F32":
        spot = (base + P0 + row * (COLS * 4)).to(tl.pointer_type(tl.float32))[:, None] + k[None]
        values = tl.load(spot, mask=mask, other=0.0)
    elif FORMAT == "F16":
        spot = (base + P0 + row * (COLS * 2)).to(tl.pointer_type(tl.float16))[:, None] + k[None]
        values = tl.load(spot, mask=mask, other=0.0).to(tl.float32)
    else:  # by its bits: the interpreter has bfloat16 wrong
        spot = (base + P0 + row * (COLS * 2)).to(tl.pointer_type(tl.uint16))[:, None] + k[None]
        values = (tl.load(spot, mask=mask, other=0).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values


@triton.jit
def tile(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr,
         P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Columns 64 · step … + 63 of rows [R] int64 of the matrix at `base`, or of one at each of `base` [R]: float32
    [R, 64]. Finite past COLS, and where not `there` [R]: what they are multiplied by has to be 0."""
    base += tl.zeros(row.shape, tl.int64)
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        values = tile_k(base, row, there, step, FORMAT == "Q5_K", COLS, P0)
    elif FORMAT == "Q6_K":
        values = tile_q6_k(base, row, there, step, COLS, P0, P1, P2, P3)
    elif FORMAT == "Q2_K":
        values = tile_q2_k(base, row, there, step, COLS, P0, P1, P2)
    elif FORMAT == "Q3_K":
        values = tile_q3_k(base, row, there, step, COLS, P0, P1, P2, P3)
    elif FORMAT == "IQ4_XS":
        values = tile_iq4_xs(base, row, there, step, COLS, P0, P1)
    elif FORMAT == "Q8_0":
        values = tile_q8_0(base, row, there, step, COLS, P0, P1)
    elif is_f8(FORMAT):
        values = tile_f8(base, row, there, step, FORMAT, COLS, P0, P1)
    elif FORMAT == "NVFP4":
        values = tile_nvfp4(base, row, there, step, FORMAT, COLS, P0, P1, P2)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        values = tile_float(base, row, there, step, FORMAT, COLS, P0)
    elif is_int4(FORMAT):
        values = tile_int4(base, row, there, step, FORMAT, COLS, P0, P1)
    else:
        values = tile_small(base, row, there, step, FORMAT, COLS, P0, P1, P2, P3)
    return tl.reshape(values, (row.shape[0], 64))


@triton.jit
def _unpack(buffer, out, stride, rows, COLS: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr,
            P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Grid (rows / R, columns / 64)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < rows
    step = tl.program_id(1)
    values = tile(buffer, row, there, step, FORMAT, COLS, P0, P1, P2, P3)
    k = step * 64 + tl.arange(0, 64)
    mask = there[:, None] & (k < COLS)[None]
    tl.store(out + row[:, None] * stride + k[None], values.to(out.dtype.element_ty), mask=mask)


def dequantise_into(buffer: Tensor, form: Matrix, out: Tensor) -> None:
    """The matrix `form` in `buffer` uint8 [bytes] → out [rows, cols] in its type, each value rounded once.

    The buffer starts at a multiple of 16 bytes; rows of `out` may be apart.
    """
    assert out.shape == (form.rows, form.cols)
    assert out.stride(1) == 1
    assert buffer.is_contiguous()
    assert form.cols % max(32, FORMATS[form.format].block) == 0
    _unpack[(triton.cdiv(form.rows, 64), triton.cdiv(form.cols, STEP))](
        buffer, out, out.stride(0), form.rows, COLS=form.cols, R=64, FORMAT=form.format, **planes("P", form),
    )  # fmt: skip
