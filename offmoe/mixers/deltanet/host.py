"""Gated DeltaNet on the CPU, in plain torch: the reference for `device.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.deltanet import DeltaWeights, delta_mix
from offmoe.mixers.deltanet.config import DeltaConfig
from offmoe.mixers.protocols import Tensors
from offmoe.mixers.recurrent_mixer import RecurrentMixer


def load_weights(config: DeltaConfig, tensors: Tensors) -> DeltaWeights:
    """Weights of one layer beyond its projections, float32: the same on the CPU and on a GPU."""
    conv, decay, dt, norm = (tensors.load(f"delta_{role}", torch.float32) for role in ("conv", "decay", "dt", "norm"))
    taps = conv.view(config.delta.channels, config.delta.taps).t().contiguous()
    return DeltaWeights(config.delta, taps, decay, dt, norm, config.eps, tensors.tiled)


class Host(RecurrentMixer[DeltaWeights]):
    """DeltaNet of one layer."""

    def __init__(self, config: DeltaConfig, tensors: Tensors) -> None:
        super().__init__(config, load_weights(config, tensors))

    def _rule(self, projected: Tensor, memory: Tensor, recent: Tensor, start: int) -> Tensor:
        return delta_mix(projected, self.weights, memory, recent, start)
