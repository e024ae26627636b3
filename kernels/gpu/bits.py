"""Codes as the subnormal floats that they are: see dot.py."""

from __future__ import annotations

import triton
import triton.language as tl

BACK = tl.constexpr(2.0**49)


@triton.jit
def word_of(words, w, N: tl.constexpr):
    """Word N of the four in the last dimension."""
    return tl.sum(tl.where(w == N, words, 0), len(words.shape) - 1)


@triton.jit
def code(word, MASK: tl.constexpr):
    """The bits of MASK as the subnormal float that they are."""
    return (word & MASK).to(tl.float32, bitcast=True)


@triton.jit
def half_of(word, HIGH: tl.constexpr):
    """One of the two float16 in a word."""
    bits = (word >> 16 if HIGH else word & 0xFFFF).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


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
