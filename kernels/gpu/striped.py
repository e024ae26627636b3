"""Positions of activations in the striped order (kernels.striped), and how a thread loads its own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lane_of(i, K: tl.constexpr):
    """Return the striped position of value i, a multiple of 16, of K values; the compiler sees a multiple of 4."""
    if K % 64 == 0:
        return (i % 64 // 4 * (K // 64) + i // 64) * 4
    else:
        return i


@triton.jit
def striped_index(i, K: tl.constexpr):
    """Return the striped position of value i of K values (kernels.striped)."""
    if K % 64 == 0:
        return lane_of(i // 16 * 16, K) + i % 4 * (K // 16) + i % 16 // 4
    else:
        return i


@triton.jit
def load_x(x, norm, base, at, mask, NORM: tl.constexpr):
    """Load the values at base + at of x, 0 where masked; with NORM times the norm's weights at `at`."""
    value = tl.load(x + base + at, mask=mask, other=0.0)
    if NORM:
        value = value * tl.load(norm + at, mask=mask, other=0.0)
    return value


@triton.jit
def load_4(x, norm, base, lane, FROM: tl.constexpr, w, mask, K: tl.constexpr, NORM: tl.constexpr):
    """Load the 4 consecutive activations of word w, out of the 16 that start FROM values after the one at `lane`."""
    NEXT: tl.constexpr = K // 16 if K % 64 == 0 else 1
    at = lane + (FROM // 4 * NEXT + w if K % 64 == 0 else FROM + w * 4)
    return (load_x(x, norm, base, at, mask, NORM),
            load_x(x, norm, base, at + NEXT, mask, NORM),
            load_x(x, norm, base, at + 2 * NEXT, mask, NORM),
            load_x(x, norm, base, at + 3 * NEXT, mask, NORM))  # fmt: skip


@triton.jit
def sum_4(a):
    """Return the sum of four tensors, in pairs."""
    return (a[0] + a[1]) + (a[2] + a[3])
