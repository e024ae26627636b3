"""Recurrent layers, naive: dispatch between DeltaNet and short convolutions; the twin of kernels.gpu.recurrent."""

from __future__ import annotations

from torch import Tensor

from offmoe.kernels.deltanet import Delta, DeltaWeights, delta_mix
from offmoe.kernels.shortconv import ConvWeights, ShortConv, conv_mix

Mixer = Delta | ShortConv
MixerWeights = DeltaWeights | ConvWeights


def mix(projected: Tensor, w: MixerWeights, memory: Tensor, recent: Tensor, start: int) -> Tensor:
    """Mix the T tokens from position `start` on: projected [T, sum of Mixer.projected] → [T, values] float32.

    memory and recent, float32, are updated in place.
    """
    if isinstance(w, DeltaWeights):
        return delta_mix(projected, w, memory, recent, start)
    return conv_mix(projected, w, memory, recent, start)
