"""Dot products of groups of 32, 64 or 128 4-bit codes, two per byte (kernels.formats.int4_groups). A unit is 32."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.formats.bits import BACK, code, dot_nibbles


@triton.constexpr_function
def is_int4(fmt):
    return fmt.startswith("INT4_")


@triton.constexpr_function
def has_zeros(fmt):
    return fmt.endswith("_ZEROS")


@triton.constexpr_function
def brain(fmt):
    """Return whether scales are bfloat16."""
    return "BF16" in fmt


@triton.constexpr_function
def sharing(fmt):
    """Return the units of 32 that share a scale."""
    return FORMATS[fmt].block // 32


@triton.jit
def head_of(buffer, at, mask, FORMAT: tl.constexpr):
    """Load the scale's bits and, if any, those of the zero point after it; `at` counts groups from `buffer`."""
    if has_zeros(FORMAT):
        return tl.load(buffer.to(tl.pointer_type(tl.uint32)) + at, mask=mask, other=0)
    else:
        return tl.load(buffer.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)


@triton.jit
def scale_of(head, FORMAT: tl.constexpr):
    if brain(FORMAT):  # by its bits: the interpreter has bfloat16 wrong
        return (head.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return head.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def words_int4(buffer, origin, at, mask, FORMAT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Load four words of codes [R, U, 4]; the scale and zero point of their group [R, U]."""
    HEAD: tl.constexpr = 4 if has_zeros(FORMAT) else 2
    words = buffer.to(tl.pointer_type(tl.uint32))
    spot = (origin[None, :] + P1 // 4 + at * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    codes = tl.load(words + spot, mask=mask[:, :, None], other=0)
    group = origin[None, :] * (4 // HEAD) + P0 // HEAD + at // sharing(FORMAT)
    return codes, head_of(buffer, group, mask, FORMAT)


@triton.jit
def fold_int4(words, xs, FORMAT: tl.constexpr):
    """Return [R, U]; xs from dot_32.x_pairs."""
    codes, even, odd = words[0], xs[0], xs[1]
    none = tl.zeros(codes.shape, tl.float32)
    low, high = dot_nibbles(none, none, codes, even[0], even[1], even[2], even[3], odd[0], odd[1], odd[2], odd[3])
    total = tl.sum(low + high, 2)
    if has_zeros(FORMAT):
        total = (total - code(words[1], 0xFF0000) * (xs[2] * 2.0**84)[None]) * BACK
    else:
        total = total * BACK - (8 * xs[2])[None]
    return scale_of(words[1], FORMAT) * total
