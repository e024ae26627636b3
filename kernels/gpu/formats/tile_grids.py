"""Dequantisation of IQ1, IQ2 and IQ3, 64 columns at a time: eight times eight weights of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.formats.bits import four, number
from offmoe.kernels.gpu.formats.dot_grids import less_one, scale_iq1_m
from offmoe.kernels.gpu.formats.grids import entry_of, odd_weights, spread, spread_even, three_bits, two_bits
from offmoe.kernels.gpu.formats.tile_words import double_from, half_from, words_from


@triton.jit
def words_of_two(address, there):
    """Load two words from each address [R] on: [R, 2]."""
    return words_from(address[:, None], tl.arange(0, 2)[None], there[:, None])


@triton.jit
def words_of_four(address, there):
    """Load four words from each address [R] on: [R, 2, 2]."""
    words = words_from(address[:, None], tl.arange(0, 4)[None], there[:, None])
    return tl.reshape(words, (address.shape[0], 2, 2))


@triton.jit
def shifted(words, BITS: tl.constexpr):
    """Return words […] as they are and shifted right: […, 2]. Joined, for Triton moves words [:, None] to others'
    threads.
    """
    return tl.join(words, words >> BITS)


@triton.jit
def four_fields(words, BITS: tl.constexpr):
    """Return words [R, 2] with each of their fields of BITS bits in the lowest ones: [R, 2, 2, 2]."""
    return shifted(shifted(words, 2 * BITS), BITS)


@triton.jit
def four_times(values):
    two = tl.join(values, values)
    return tl.join(two, two)


@triton.jit
def eight_times(values):
    """Return values […] eight times: […, 2, 2, 2]."""
    four = four_times(values)
    return tl.join(four, four)


@triton.jit
def numbered(G: tl.constexpr, Q: tl.constexpr, H: tl.constexpr):
    """Number eights of [R, 2, 2, 2]: G times the first index, Q times the second and H times the third."""
    g, q, h = tl.arange(0, 2)[None, :, None, None], tl.arange(0, 2)[None, None, :, None], tl.arange(0, 2)
    return G * g + Q * q + H * h[None, None, None]


@triton.jit
def fours(first, last, zero):
    """Return bytes of `first` [R, 2, 2, 2] as four weights less `zero`, then those of `last`: [R, 2, 2, 2, 2, 2, 2]."""
    values = tl.join(four(first, zero), four(last, zero))  # byte's second bit, its first bit, word
    return tl.permute(values, 0, 1, 2, 3, 6, 4, 5)


@triton.jit
def in_turns(first, last, zero):
    """Return bytes in which weights w and w + 4 are neighbours, as `fours` does."""
    return tl.permute(tl.join(four(first, zero), four(last, zero)), 0, 1, 2, 3, 5, 6, 4)


@triton.jit
def shared(scale):
    """Return scales [R, 2, 1 or 2] of 32 or 16 weights each, to be multiplied by values."""
    return scale[:, :, :, None, None, None, None]


@triton.jit
def scale_from(base, block, there):
    """Return the blocks' float16 [R, 1, 1]."""
    bits = half_from(base, block, there).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)[:, None, None]


@triton.jit
def four_scales(base, at, there):
    """Return four scales of 4 bits, of the `at`-th 16, plus a half and by 4: [R, 2, 2]."""
    g, q = tl.arange(0, 2)[None, :, None], tl.arange(0, 2)[None, None]
    return number(half_from(base, at, there)[:, None, None] >> 8 * g + 4 * q & 15) * 0.25 + 0.125


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
    return tl.reshape(values, (row.shape[0], 64))


@triton.jit
def tile_iq2_xxs(base, block, j, there, p0, p1, grids):
    index, signs = tl.split(words_of_four(base + p1 + block * 64 + j * 16, there))  # [R, 2]
    entry = entry_of(grids, four_fields(index, 8) & 0xFF, "IQ2_XXS")
    first, last = two_bits(entry, spread_even(four_fields(signs, 7) & 127))
    scale = four_times(number(signs >> 28) * 0.25 + 0.125)
    return in_turns(first, last, 64.0) * (eight_times(scale) * shared(scale_from(base + p0, block, there)))


@triton.jit
def tile_iq2_xs(base, block, j, there, p0, p1, p2, grids):
    codes = shifted(words_of_four(base + p1 + block * 64 + j * 16, there), 16)
    first, last = two_bits(entry_of(grids, codes & 511, "IQ2_XS"), spread_even(codes >> 9 & 127))
    scale = scale_from(base + p0, block, there) * four_scales(base + p2, block * 4 + j, there)
    return in_turns(first, last, 64.0) * shared(scale)


@triton.jit
def tile_iq2_s(base, block, j, there, p0, p1, p2, p3, grids):
    lower = four_fields(words_of_two(base + p1 + block * 32 + j * 8, there), 8) & 0xFF
    signs = four_fields(words_of_two(base + p2 + block * 32 + j * 8, there), 8) & 0xFF
    upper = half_from(base + p3, block * 8 + j, there)[:, None, None, None] >> numbered(8, 4, 2) & 3
    first, last = two_bits(entry_of(grids, lower | upper << 8, "IQ2_S"), spread(signs))
    scale = scale_from(base + p0, block, there) * four_scales(base + p3, block * 8 + 4 + j, there)
    return in_turns(first, last, 64.0) * shared(scale)


@triton.jit
def tile_iq3_xxs(base, block, j, there, p0, p1, p2, grids):
    index = shifted(words_of_four(base + p1 + block * 64 + j * 16, there), 16)
    signs = words_of_two(base + p2 + block * 32 + j * 8, there)
    first, last = three_bits(entry_of(grids, index & 0xFF, "IQ3_XXS"), entry_of(grids, index >> 8 & 0xFF, "IQ3_XXS"),
                             spread_even(four_fields(signs, 7) & 127))  # fmt: skip
    scale = four_times(number(signs >> 28) * 0.5 + 0.25)
    return fours(first, last, 128.0) * (eight_times(scale) * shared(scale_from(base + p0, block, there)))


@triton.jit
def tile_iq3_s(base, block, j, there, p0, p1, p2, p3, grids):
    index = shifted(words_of_four(base + p1 + block * 64 + j * 16, there), 16)
    signs = four_fields(words_of_two(base + p2 + block * 40 + 8 + j * 8, there), 8) & 0xFF
    upper = half_from(base + p2, block * 20 + j, there)[:, None, None, None] >> numbered(8, 4, 2)
    nibbles = odd_weights(entry_of(grids, index & 0xFF | (upper & 1) << 8, "IQ3_S"),
                          entry_of(grids, index >> 8 & 0xFF | (upper & 2) << 7, "IQ3_S"), spread(signs))  # fmt: skip
    scale = words_from(base + p3, block, there)[:, None] >> 8 * j[:, None] + (4 * tl.arange(0, 2))[None]
    scale = scale_from(base + p0, block, there) * (number(scale & 15) * 4.0 + 2.0)[:, :, None]
    return fours(nibbles & 0x0F0F0F0F, nibbles >> 4 & 0x0F0F0F0F, 7.5) * shared(scale)


@triton.jit
def tile_iq1_s(base, block, j, there, p0, p1, p2, grids):
    lower = four_fields(words_of_two(base + p1 + block * 32 + j * 8, there), 8) & 0xFF
    head = words_from(base + p2 + block * 16, j, there)[:, None] >> (16 * tl.arange(0, 2))[None]  # [R, 2]
    upper = head[:, :, None, None] >> numbered(0, 6, 3) & 7
    entry = entry_of(grids, lower | upper << 8, "IQ1_S")
    values = fours(entry & 0x0F0F0F0F, entry >> 4 & 0x0F0F0F0F, less_one(head >> 15)[:, :, None, None])
    return values * shared(scale_from(base + p0, block, there) * (number(head >> 12 & 7) * 2.0 + 1.0)[:, :, None])


@triton.jit
def tile_iq1_m(base, block, j, there, p0, p1, p2, grids):
    lower = four_fields(words_of_two(base + p0 + block * 32 + j * 8, there), 8) & 0xFF
    head = words_from(base + p1 + block * 16, j, there)[:, None, None, None] >> numbered(16, 8, 4)
    entry = entry_of(grids, lower | (head & 7) << 8, "IQ1_M")
    values = fours(entry & 0x0F0F0F0F, entry >> 4 & 0x0F0F0F0F, less_one(head >> 3))
    g, q = tl.arange(0, 2)[None, :, None], tl.arange(0, 2)[None, None]
    small = number(half_from(base + p2, block * 4 + j, there)[:, None, None] >> 6 * g + 3 * q & 7)
    scale = scale_iq1_m(double_from(base + p2, block, there))[:, None, None]
    return values * shared(scale * (small * 2.0 + 1.0))
