"""Striped order of activations in the decode step: each thread's values are contiguous.

A GEMV thread multiplies 64 neighbouring weights of a row; a word of quants holds four neighbours, or the first four of
16. So value i of a vector of K, p = i % 64, is at ((p // 16 · 4 + p % 4) · K/64 + i // 64) · 4 + p % 16 // 4 if K is a
multiple of 64, else at i: a thread reads 16 bytes, and 32 threads 32 neighbours of them. In any other order Triton
moves x through shared memory, 16 times per program.
"""

from __future__ import annotations

from torch import Tensor

LANE = 64


def stripe(x: Tensor) -> Tensor:
    """Reorder […, K] from natural to striped order."""
    k = x.shape[-1]
    if k % LANE:
        return x
    return x.unflatten(-1, (k // LANE, 4, 4, 4)).movedim((-3, -1, -4, -2), (-4, -3, -2, -1)).flatten(-4)


def unstripe(x: Tensor) -> Tensor:
    """Reorder […, K] from striped to natural order."""
    k = x.shape[-1]
    if k % LANE:
        return x
    return x.unflatten(-1, (4, 4, k // LANE, 4)).movedim((-4, -3, -2, -1), (-3, -1, -4, -2)).flatten(-4)
