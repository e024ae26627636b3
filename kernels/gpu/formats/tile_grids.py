"""Dequantisation of IQ1, IQ2 and IQ3, 64 columns at a time: eight times eight weights of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.formats.bits import four, number
from offmoe.kernels.gpu.formats.dot_grids import less_one, scale_iq1_m
from offmoe.kernels.gpu.formats.grids import entry_of, odd_weights, spread, spread_even, three_bits, two_bits
from offmoe.kernels.gpu.formats.tile_words import double_from, half_from, words_from


@triton.jit
def some_words(address, there, W: tl.constexpr):
    """Load W words from each address [R] on: [R, W]."""
    return words_from(address[:, None], tl.arange(0, W)[None], there[:, None])


@triton.jit
def fours(first, last, zero):
    """Return bytes of `first` [R, …] as four weights less `zero`, then those of `last`: [R, 64]."""
    values = tl.join(four(first, zero), four(last, zero))  # byte's second bit, its first bit, word
    values = tl.permute(values, 0, 1, 2, 5, 3, 4) if len(values.shape) == 6 else tl.permute(values, 0, 1, 2, 3, 6, 4, 5)
    return tl.reshape(values, (first.shape[0], 64))


@triton.jit
def in_turns(first, last, zero):
    """Return bytes in which weights w and w + 4 are neighbours: [R, 64]."""
    values = tl.permute(tl.join(four(first, zero), four(last, zero)), 0, 1, 2, 4, 5, 3)
    return tl.reshape(values, (first.shape[0], 64))


@triton.jit
def times(values, scale):
    """Multiply values [R, 64] by the scales [R, G] of equal groups."""
    R: tl.constexpr = values.shape[0]
    G: tl.constexpr = scale.shape[1]
    return tl.reshape(tl.reshape(values, (R, G, 64 // G)) * scale[:, :, None], (R, 64))


@triton.jit
def scale_from(base, plane, block, there):
    """Return the blocks' float16 [R, 1]."""
    bits = half_from(base + plane, block, there).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)[:, None]


@triton.jit
def four_scales(base, block, j, there):
    """Return the j-th four of sixteen scales of 4 bits, plus a half and by 4: [R, 4]."""
    word = half_from(base, block * 4 + j, there)[:, None] >> (4 * tl.arange(0, 4))[None]
    return number(word & 15) * 0.25 + 0.125


@triton.jit
def tile_grid(base, row, there, step, FORMAT: tl.constexpr, COLS: tl.constexpr, p0, p1, p2, p3, grids):
    """Return columns 64 · step … + 63 of rows [R]: [R, 64]. `step` may be [R] too, a step a row."""
    j, block = step % 4 + tl.zeros(row.shape, tl.int32), row * (COLS // 256) + step // 4
    if FORMAT == "IQ1_M":
        values = tile_iq1_m(base, block, j, there, p0, p1, p2, grids)
    elif FORMAT == "IQ1_S":
        values = tile_iq1_s(base, block, j, there, p0, p1, p2, grids)
    elif FORMAT == "IQ2_XXS":
        values = tile_iq2_xxs(base, block, j, there, p0, p1, grids)
    elif FORMAT == "IQ2_XS":
        values = tile_iq2_xs(base, block, j, there, p0, p1, p2, grids)
    elif FORMAT == "IQ2_S":
        values = tile_iq2_s(base, block, j, there, p0, p1, p2, p3, grids)
    elif FORMAT == "IQ3_XXS":
        values = tile_iq3_xxs(base, block, j, there, p0, p1, p2, grids)
    else:
        values = tile_iq3_s(base, block, j, there, p0, p1, p2, p3, grids)
    return values


@triton.jit
def tile_iq2_xxs(base, block, j, there, p0, p1, grids):
    g, e = tl.arange(0, 2)[None], tl.arange(0, 4)[None, None]
    both = double_from((base + p1 + block * 64 + j * 16)[:, None], g, there[:, None])  # [R, 2]
    index, signs = both.to(tl.uint32), (both >> 32).to(tl.uint32)
    entry = entry_of(grids, index[:, :, None] >> 8 * e & 0xFF, "IQ2_XXS")
    first, last = two_bits(entry, spread_even(signs[:, :, None] >> 7 * e & 127))
    return times(in_turns(first, last, 64.0), scale_from(base, p0, block, there) * (number(signs >> 28) * 0.25 + 0.125))


@triton.jit
def tile_iq2_xs(base, block, j, there, p0, p1, p2, grids):
    codes = some_words(base + p1 + block * 64 + j * 16, there, 4)[:, :, None] >> (16 * tl.arange(0, 2))[None, None]
    first, last = two_bits(entry_of(grids, codes & 511, "IQ2_XS"), spread_even(codes >> 9 & 127))
    return times(
        in_turns(first, last, 64.0), scale_from(base, p0, block, there) * four_scales(base + p2, block, j, there)
    )


@triton.jit
def tile_iq2_s(base, block, j, there, p0, p1, p2, p3, grids):
    g, e = tl.arange(0, 2)[None, :, None], tl.arange(0, 4)[None, None]
    lower = some_words(base + p1 + block * 32 + j * 8, there, 2)[:, :, None] >> 8 * e & 0xFF
    signs = some_words(base + p2 + block * 32 + j * 8, there, 2)[:, :, None] >> 8 * e & 0xFF
    upper = half_from(base + p3, block * 8 + j, there)[:, None, None] >> 8 * g + 2 * e & 3
    first, last = two_bits(entry_of(grids, lower | upper << 8, "IQ2_S"), spread(signs))
    scale = scale_from(base, p0, block, there) * four_scales(base + p3 + 8, block * 2, j, there)
    return times(in_turns(first, last, 64.0), scale)


@triton.jit
def indices(base, block, j, there):
    """Return the words of 64 indices' bytes [R, 2, 2], shifted right by 0 and by 16: [R, 2, 2, 2]."""
    words = tl.reshape(some_words(base + block * 64 + j * 16, there, 4), (block.shape[0], 2, 2))
    return words[:, :, :, None] >> (16 * tl.arange(0, 2))[None, None, None]


@triton.jit
def numbered():
    """Return which eight weights of 32 each is, of [R, 2, 2, 2]."""
    return (2 * tl.arange(0, 2))[None, None, :, None] + tl.arange(0, 2)[None, None, None, :]


@triton.jit
def tile_iq3_xxs(base, block, j, there, p0, p1, p2, grids):
    index, e = indices(base + p1, block, j, there), numbered()
    signs = some_words(base + p2 + block * 32 + j * 8, there, 2)
    first, last = three_bits(entry_of(grids, index & 0xFF, "IQ3_XXS"), entry_of(grids, index >> 8 & 0xFF, "IQ3_XXS"),
                             spread_even(signs[:, :, None, None] >> 7 * e & 127))  # fmt: skip
    return times(fours(first, last, 128.0), scale_from(base, p0, block, there) * (number(signs >> 28) * 0.5 + 0.25))


@triton.jit
def tile_iq3_s(base, block, j, there, p0, p1, p2, p3, grids):
    index, e, g = indices(base + p1, block, j, there), numbered(), tl.arange(0, 2)
    signs = some_words(base + p2 + block * 40 + 8 + j * 8, there, 2)[:, :, None, None] >> 8 * e & 0xFF
    upper = half_from(base + p2, block * 20 + j, there)[:, None, None, None] >> 8 * g[None, :, None, None] + 2 * e
    nibbles = odd_weights(entry_of(grids, index & 0xFF | (upper & 1) << 8, "IQ3_S"),
                          entry_of(grids, index >> 8 & 0xFF | (upper & 2) << 7, "IQ3_S"), spread(signs))  # fmt: skip
    scale = words_from(base + p3, block, there)[:, None] >> (8 * j[:, None] + 4 * g[None])
    scale = scale_from(base, p0, block, there) * (number(scale & 15) * 4.0 + 2.0)
    return times(fours(nibbles & 0x0F0F0F0F, nibbles >> 4 & 0x0F0F0F0F, 7.5), scale)


@triton.jit
def tile_iq1_s(base, block, j, there, p0, p1, p2, grids):
    g, e = tl.arange(0, 2)[None], tl.arange(0, 4)[None, None]
    lower = some_words(base + p1 + block * 32 + j * 8, there, 2)[:, :, None] >> 8 * e & 0xFF
    head = words_from(base + p2 + block * 16, j, there)[:, None] >> 16 * g  # [R, 2]
    entry = entry_of(grids, lower | (head[:, :, None] >> 3 * e & 7) << 8, "IQ1_S")
    values = fours(entry & 0x0F0F0F0F, entry >> 4 & 0x0F0F0F0F, less_one(head >> 15)[:, :, None])
    return times(values, scale_from(base, p0, block, there) * (number(head >> 12 & 7) * 2.0 + 1.0))


@triton.jit
def tile_iq1_m(base, block, j, there, p0, p1, p2, grids):
    g, e = tl.arange(0, 2)[None, :, None], tl.arange(0, 4)[None, None]
    lower = some_words(base + p0 + block * 32 + j * 8, there, 2)[:, :, None] >> 8 * e & 0xFF
    head = words_from(base + p1 + block * 16, j, there)[:, None, None] >> 16 * g + 4 * e
    entry = entry_of(grids, lower | (head & 7) << 8, "IQ1_M")
    values = fours(entry & 0x0F0F0F0F, entry >> 4 & 0x0F0F0F0F, less_one(head >> 3))
    small = half_from(base + p2, block * 4 + j, there)[:, None] >> (3 * tl.arange(0, 4))[None]
    scale = scale_iq1_m(double_from(base + p2, block, there))[:, None]
    return times(values, scale * (number(small & 7) * 2.0 + 1.0))
