"""Codes used as subnormal floats (see dot.py); table lookups of four codes at once."""

from __future__ import annotations

import triton
import triton.language as tl

BACK = tl.constexpr(2.0**49)


@triton.jit
def word_of(words, w, N: tl.constexpr):
    """Return word N of the four in the last dimension."""
    return tl.sum(tl.where(w == N, words, 0), len(words.shape) - 1)


@triton.jit
def code(word, MASK: tl.constexpr):
    """Return the bits of MASK, reinterpreted as a subnormal float."""
    return (word & MASK).to(tl.float32, bitcast=True)


@triton.jit
def half_of(word, HIGH: tl.constexpr):
    """Return one of the two float16 in a word."""
    bits = (word >> 16 if HIGH else word & 0xFFFF).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dot_nibbles(low, high, word, l0, l1, l2, l3, h0, h1, h2, h3):
    """Add Σ of a word's low nibbles times l and of its high ones times h, both · 2^-49, in one chain of FMA each."""
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
    """Add Σ of a word's 4 unsigned bytes times x, · 2^-49. Bit 23 is an exponent's lowest, and still adds 2^-126.

    This is one of two orders of bytes, out of five tried, with which nothing else spills: look at all formats when it
    changes.
    """
    total = code(word, 0xFF) * (x0 * 2.0**100)[None] + total
    total = code(word, 0xFF00) * (x1 * 2.0**92)[None] + total
    total = (word >> 24).to(tl.float32, bitcast=True) * (x3 * 2.0**100)[None] + total
    return code(word, 0xFF0000) * (x2 * 2.0**84)[None] + total


@triton.jit
def dot_8(total, first, last, a, h):
    """Add Σ of the bytes of eight codes, in memory order, times a (low nibbles) and h, · 2^-49."""
    return dot_bytes(dot_bytes(total, first, a[0], h[0], a[1], h[1]), last, a[2], h[2], a[3], h[3])


@triton.jit
def number(value):
    """Return an integer from 0 to 2^23 - 1 as float32."""
    return (value.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


INTERPRETED = tl.constexpr(not isinstance(number, triton.JITFunction))
PLACED = tl.constexpr(tuple(f"prmt.b32 $0, $1, $2, 0x74{byte}4;" for byte in range(4)))


@triton.jit
def unsigned(word, BYTE: tl.constexpr):
    """Return 32768 plus a byte of the word, as float32: the byte is the upper half of the mantissa. One instruction."""
    if INTERPRETED:
        bits = (word >> (8 * BYTE) & 0xFF) << 8 | 0x47000000
    else:
        bits = tl.inline_asm_elementwise(PLACED[BYTE], "=r,r,r", [word, 0x47000000], dtype=tl.uint32, is_pure=True,
                                         pack=1)  # fmt: skip
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def in_order(a, b, c, d):
    """Return four tensors […] as one […, 2, 2]."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def four(word, zero):
    """Return bytes 0 … 3 less `zero`, as float32 […, 2, 2], of a word […]; exact."""
    zero += 32768.0
    return in_order(unsigned(word, 0) - zero, unsigned(word, 1) - zero, unsigned(word, 2) - zero,
                    unsigned(word, 3) - zero)  # fmt: skip


@triton.jit
def picked(word, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Look up four bytes by the word's four lower nibbles: 0 to 7 in the 7-bit table in words FIRST and LAST; from 8
    on, 0.

    One instruction, which for a nibble from 8 on repeats the sign of the byte.
    """
    if INTERPRETED:
        bytes, table = word & 0, tl.full((), LAST * 2**32 + FIRST, tl.uint64)
        for i in tl.static_range(4):  # NumPy shifts everything out where it shifts by 64 and more
            bytes |= (table >> (word >> (4 * i) & 15) * 8 & 0xFF).to(tl.uint32) << (8 * i)
        return bytes
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [FIRST, LAST, word], dtype=tl.uint32,
                                         is_pure=True, pack=1)  # fmt: skip


@triton.jit
def iq4(word):
    """Return the values of four IQ4 codes in the lower half of a word, plus 128. Codes below 8 are negative."""
    return picked(word ^ 0x8888, 0x26190D01, 0x71594535) + 0x80808080 - picked(word, 0x4153687F, 0x0A162331)


@triton.jit
def fp4(word):
    """Return twice the values of four e2m1 codes in the lower half of a word, plus 16."""
    return picked(word, 0x03020100, 0x0C080604) + 0x10101010 - picked(word ^ 0x8888, 0x03020100, 0x0C080604)
