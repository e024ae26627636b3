"""Words of 64 columns of some rows, and the codes in them: for unpack.py.

Codes are moved into the bytes of words, four at a time; a byte becomes a float32 with one permutation of bytes and one
subtraction (bits.four), since conversion runs at an eighth of the rate. Values smaller than a word, scales, are read as
the word that holds them: Triton prefetches only words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.formats.bits import four


@triton.jit
def words_from(address, word, mask):
    return tl.load(address.to(tl.pointer_type(tl.uint32)) + word, mask=mask, other=0)


@triton.jit
def words_at(base, row, there, at, ROW: tl.constexpr, W: tl.constexpr):
    """Load W words from the at-th of ROW words per row, from `base` on: [R, W].

    The load is one-dimensional, so that Triton gives it a layout of neighbouring threads; otherwise it stores the
    results 16 bits at a time.
    """
    word = at * W + tl.arange(0, W)
    return words_from((base + row * (ROW * 4))[:, None], word[None], there[:, None] & (word < ROW)[None])


@triton.jit
def eight_words(address, there):
    """Return [R, 1, 8] of [R, 8]. A slice [:, None, :] would do, but Triton moves it through shared memory."""
    return words_from(address[:, None, None], tl.arange(0, 8)[None, None], there[:, None, None])


@triton.jit
def double_from(address, at, mask):
    """Combine two words, the first one lower."""
    return tl.load(address.to(tl.pointer_type(tl.uint64)) + at, mask=mask, other=0)


@triton.jit
def half_from(address, at, mask):
    """Load the at-th 16 bits, in the lower half of a word."""
    return words_from(address, at // 2, mask) >> (at % 2 * 16).to(tl.uint32)


@triton.jit
def halves_at(base, row, there, step, ROW: tl.constexpr):
    """Load the 16-bit numbers 2 · step and the next of ROW per row, as bits [R, 2]."""
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
    """Load N bytes, two or four, per row: uint32 [R, N]."""
    b = tl.arange(0, N)[None]
    if ROW % N == 0:
        at = row * ROW + step * N
        return words_from(base, at // 4, there)[:, None] >> (at % 4 * 8).to(tl.uint32)[:, None] >> (8 * b) & 0xFF
    else:
        spot = base[:, None] + (row * ROW)[:, None] + (step * N + b)
        return tl.load(spot, mask=there[:, None] & (step * N + b < ROW), other=0).to(tl.uint32)


@triton.jit
def in_halves(low, high, zero):
    """Return the bytes of `low` [R, G, W], then those of `high`, less `zero`: [R, G, 2, W, 2, 2]."""
    return four(tl.permute(tl.join(low, high), 0, 1, 3, 2), zero)


@triton.jit
def looked_up(first, last, zero, TURNS: tl.constexpr):
    """Return the table values of the nibbles in words [R, G, W], less `zero`: [R, G, …].

    Nibbles are taken in memory order, or all low ones before the high ones.
    """
    values = tl.join(four(first, zero), four(last, zero))  # byte's second bit, nibble, byte's first bit
    if TURNS:
        return tl.permute(values, 0, 1, 2, 5, 3, 4)
    else:
        return tl.permute(values, 0, 1, 4, 2, 5, 3)
