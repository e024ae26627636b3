"""Where activations stand (kernels.striped), and how a lane reads its own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lane_of(i, K: tl.constexpr):
    """Where value i, a multiple of 16, of an activation of K values stands; the compiler sees a multiple of 4."""
    if K % 64 == 0:
        return (i % 64 // 4 * (K // 64) + i // 64) * 4
    else:
        return i


@triton.jit
def place(i, K: tl.constexpr):
    """Where any value stands: see kernels.striped."""
    if K % 64 == 0:
        return lane_of(i // 16 * 16, K) + i % 4 * (K // 16) + i % 16 // 4
    else:
        return i


@triton.jit
def load_x(x, norm, base, at, mask, NORM: tl.constexpr):
    """What stands at `at` of the vector at `base` of x, 0 where it is masked; times the norm's weight."""
    value = tl.load(x + base + at, mask=mask, other=0.0)
    if NORM:
        value = value * tl.load(norm + at, mask=mask, other=0.0)
    return value


@triton.jit
def load_4(x, norm, base, lane, FROM: tl.constexpr, w, mask, K: tl.constexpr, NORM: tl.constexpr):
    """Of the sixteen that begin FROM values behind the one at `lane`, the four neighbours in each word w."""
    NEXT: tl.constexpr = K // 16 if K % 64 == 0 else 1
    at = lane + (FROM // 4 * NEXT + w if K % 64 == 0 else FROM + w * 4)
    return (load_x(x, norm, base, at, mask, NORM),
            load_x(x, norm, base, at + NEXT, mask, NORM),
            load_x(x, norm, base, at + 2 * NEXT, mask, NORM),
            load_x(x, norm, base, at + 3 * NEXT, mask, NORM))  # fmt: skip


@triton.jit
def sum_4(a):
    return (a[0] + a[1]) + (a[2] + a[3])
