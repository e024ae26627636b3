"""Gated short convolutions (LFM2, arXiv 2511.23404), naive: every channel looks at its last inputs.

DeltaNet's layers begin with the same convolution, without the gates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShortConv:
    """Shape of a short-convolution layer."""

    channels: int
    taps: int

    @property
    def values(self) -> int:
        return self.channels

    @property
    def memory(self) -> tuple[int, ...]:
        """No memory in addition to the newest inputs."""
        return (0,)

    @property
    def projected(self) -> tuple[int, int, int]:
        """Rows of the projections: the gates before and after the convolution, and its input."""
        return self.channels, self.channels, self.channels


@dataclass(frozen=True)
class ConvWeights:
    """Weights of a layer besides its projections, float32."""

    shape: ShortConv
    conv: Tensor  # [taps, channels]: the last tap is the present token's

    def tensors(self) -> list[Tensor]:
        return [self.conv]


def conv_mix(projected: Tensor, w: ConvWeights, memory: Tensor, recent: Tensor, start: int) -> Tensor:
    """Mix the T tokens from position `start` on: projected [T, sum of ShortConv.projected] → [T, channels] float32.

    recent [taps, channels] float32 is updated in place; `memory` is empty.
    """
    before, behind, x = projected.float().split(w.shape.projected, dim=-1)
    return behind * short_convolution(before * x, w.conv, recent, start)


def short_convolution(x: Tensor, weight: Tensor, recent: Tensor, start: int) -> Tensor:
    """Every channel of x [T, C] over its last taps; the newest inputs stay in `recent` [taps, C]."""
    taps, count = len(weight), len(x)
    rows = torch.arange(start + 1, start + taps, device=x.device) % taps
    padded = torch.cat((recent[rows], x))
    newest(x, recent, start)
    return sum((padded[i : i + count] * weight[i] for i in range(taps)), start=torch.zeros_like(x))


def newest(x: Tensor, recent: Tensor, start: int) -> None:
    """Keep the last of the inputs x [T, C], from position `start` on, in `recent` [taps, C]."""
    end, taps = start + len(x), len(recent)
    last = x[-taps:]
    recent[torch.arange(end - len(last), end, device=x.device) % taps] = last.to(recent.dtype)
