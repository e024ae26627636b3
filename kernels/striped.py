"""The order of activations in the decode step: lane by lane.

A GEMV's lane multiplies 64 neighbouring weights of a row. So that 32 lanes read 32 neighbouring values of x at a time,
value i of a vector of K stands at (i mod 64) · K/64 + i div 64, where K is a multiple of 64, and at i elsewhere.
"""

from __future__ import annotations

from torch import Tensor

LANE = 64


def stripe(x: Tensor) -> Tensor:
    """[…, K] in natural order → in the order of the lanes."""
    k = x.shape[-1]
    return x.unflatten(-1, (k // LANE, LANE)).transpose(-1, -2).flatten(-2) if k % LANE == 0 else x


def unstripe(x: Tensor) -> Tensor:
    """The way back."""
    k = x.shape[-1]
    return x.unflatten(-1, (LANE, k // LANE)).transpose(-1, -2).flatten(-2) if k % LANE == 0 else x
