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
from offmoe.kernels.gpu.formats.dot_32 import fold_q8_0, fold_small, words_q8_0, words_small, x_32, x_pairs
from offmoe.kernels.gpu.formats.dot_256 import (
    fold_iq4_xs,
    fold_k,
    fold_q6_k,
    words_iq4_xs,
    words_k,
    words_q6_k,
    x_k,
    x_sixteens,
)
from offmoe.kernels.gpu.formats.dot_crumbs import fold_q2_k, fold_q3_k, words_q2_k, words_q3_k
from offmoe.kernels.gpu.formats.dot_grids import fold_grid, words_grid, x_eights
from offmoe.kernels.gpu.formats.dot_int4 import fold_int4, is_int4, words_int4
from offmoe.kernels.gpu.formats.dot_scaled import fold_f8, fold_nvfp4, is_f8, words_f8, words_nvfp4
from offmoe.kernels.gpu.formats.grids import has_grid
from offmoe.kernels.gpu.striped import load_x, striped_index

# Weights a unit: a block of 256; else 32.
UNIT = {name: 256 if form.block == 256 else 32 for name, form in FORMATS.items()}
SHARING = {name for name, form in FORMATS.items() if form.scales or 32 < form.block < 256}  # units share scales


@triton.jit
def words_float(buffer, origin, at, mask, FORMAT: tl.constexpr, P0: tl.constexpr):
    """Load F32, F16 and BF16, 32 weights a unit: [R, U, 32]."""
    m, i = mask[:, :, None], tl.arange(0, 32)[None, None, :]
    if FORMAT == "F32":
        spot = (origin[None, :] + P0 // 4 + at * 32)[:, :, None] + i
        return (tl.load(buffer.to(tl.pointer_type(tl.float32)) + spot, mask=m, other=0.0),)
    else:
        spot = (origin[None, :] * 2 + P0 // 2 + at * 32)[:, :, None] + i
        return (tl.load(buffer.to(tl.pointer_type(tl.uint16)) + spot, mask=m, other=0),)


@triton.jit
def fold_float(words, xs, FORMAT: tl.constexpr):
    """Return [R, U]. BF16 is widened by its bits: the interpreter has bfloat16 wrong."""
    if FORMAT == "F32":
        weights = words[0]
    elif FORMAT == "F16":
        weights = words[0].to(tl.float16, bitcast=True).to(tl.float32)
    else:
        weights = (words[0].to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.sum(weights * xs[0][None], 2)


@triton.jit
def x_of(x, norm, base, start, there, FORMAT: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, grids):
    """Load the activations that a format's rows are multiplied by into registers.

    x holds striped vectors of K float32; each unit takes the values from `start` [U] of the vector at `base` [U]; 0
    where not `there` [U]. `grids`: see grids.grids_for.
    """
    if FORMAT == "Q4_K" or FORMAT == "Q5_K" or FORMAT == "IQ4_XS":
        return x_k(x, norm, base, start, there, K, NORM)
    elif FORMAT == "Q6_K":
        return x_sixteens(x, norm, base, start, there, K, NORM, 32)
    elif FORMAT == "Q2_K" or FORMAT == "Q3_K":
        return x_sixteens(x, norm, base, start, there, K, NORM, 16)
    elif has_grid(FORMAT):
        return x_eights(x, norm, base, start, there, K, NORM, grids)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        at = striped_index(start[:, None] + tl.arange(0, 32)[None, :], K)
        return (load_x(x, norm, base[:, None], at, there[:, None], NORM),)
    elif FORMAT == "MXFP4_PAIRS" or is_int4(FORMAT) or FORMAT == "NVFP4":
        return x_pairs(x, norm, base, start, there, K, NORM)
    else:
        return x_32(x, norm, base, start, there, K, NORM)


@triton.jit
def words_of(buffer, origin, at, mask, FORMAT: tl.constexpr,
             P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):  # fmt: skip
    """Load a tile's raw words; 0 where masked.

    buffer: uint8; `origin` [U]: the word at which the matrix of each unit starts; `at` [R, U]: the unit's index in its
    matrix (row · units per row + unit).
    """
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        return words_k(buffer, origin, at, mask, FORMAT == "Q5_K", P0)
    elif FORMAT == "Q6_K":
        return words_q6_k(buffer, origin, at, mask, P0, P1, P2, P3)
    elif FORMAT == "Q2_K":
        return words_q2_k(buffer, origin, at, mask, P0, P1, P2)
    elif FORMAT == "Q3_K":
        return words_q3_k(buffer, origin, at, mask, P0, P1, P2, P3)
    elif FORMAT == "IQ4_XS":
        return words_iq4_xs(buffer, origin, at, mask, P0, P1)
    elif has_grid(FORMAT):
        return words_grid(buffer, origin, at, mask, FORMAT, P0, P1, P2, P3)
    elif FORMAT == "Q8_0":
        return words_q8_0(buffer, origin, at, mask, P0, P1)
    elif is_f8(FORMAT):
        return words_f8(buffer, origin, at, mask, FORMAT, P0, P1, P2)
    elif FORMAT == "NVFP4":
        return words_nvfp4(buffer, origin, at, mask, FORMAT, P0, P1, P2, P3)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        return words_float(buffer, origin, at, mask, FORMAT, P0)
    elif is_int4(FORMAT):
        return words_int4(buffer, origin, at, mask, FORMAT, P0, P1)
    else:
        return words_small(buffer, origin, at, mask, FORMAT, P0, P1, P2, P3)


@triton.jit
def fold(words, xs, FORMAT: tl.constexpr):
    """Return rows times x over one tile of units: [R]."""
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        return tl.sum(tl.sum(fold_k(words, xs, FORMAT == "Q5_K"), 2), 1)
    elif FORMAT == "Q6_K":
        return tl.sum(tl.sum(fold_q6_k(words, xs), 2), 1)
    elif FORMAT == "Q2_K":
        return tl.sum(tl.sum(fold_q2_k(words, xs), 2), 1)
    elif FORMAT == "Q3_K":
        return tl.sum(tl.sum(fold_q3_k(words, xs), 2), 1)
    elif FORMAT == "IQ4_XS":
        return tl.sum(tl.sum(fold_iq4_xs(words, xs), 2), 1)
    elif has_grid(FORMAT):
        return tl.sum(tl.sum(fold_grid(words, xs, FORMAT), 2), 1)
    elif FORMAT == "Q8_0":
        return tl.sum(fold_q8_0(words, xs), 1)
    elif is_f8(FORMAT):
        return tl.sum(fold_f8(words, xs), 1)
    elif FORMAT == "NVFP4":
        return tl.sum(fold_nvfp4(words, xs), 1)
    elif FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        return tl.sum(fold_float(words, xs, FORMAT), 1)
    elif is_int4(FORMAT):
        return tl.sum(fold_int4(words, xs, FORMAT), 1)
    else:
        return tl.sum(fold_small(words, xs, FORMAT), 1)
