"""Gated DeltaNet on the CPU, in plain torch: the reference for `device.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.deltanet import DeltaWeights, delta_mix
from offmoe.mixers.deltanet.config import DeltaConfig
from offmoe.mixers.protocols import Tensors
from offmoe.mixers.recurrent import LayerState


def load_weights(config: DeltaConfig, tensors: Tensors) -> DeltaWeights:
    """Weights of one layer beyond its projections, float32: the same on the CPU and on a GPU."""
    conv, decay, dt, norm = (tensors.load(f"delta_{role}", torch.float32) for role in ("conv", "decay", "dt", "norm"))
    taps = conv.view(config.delta.channels, config.delta.taps).t().contiguous()
    return DeltaWeights(config.delta, taps, decay, dt, norm, config.eps, tensors.tiled)


class Host:
    """DeltaNet of one layer."""

    def __init__(self, config: DeltaConfig, tensors: Tensors) -> None:
        self.config, self.weights = config, load_weights(config, tensors)

    def tensors(self) -> list[Tensor]:
        return self.weights.tensors()

    def mix(self, projected: Tensor, cache: LayerState, positions: Tensor, start: int) -> Tensor:
        return cache.mix(projected, self.config.mixed, start, self._rule)

    def _rule(self, projected: Tensor, memory: Tensor, recent: Tensor, start: int) -> Tensor:
        return delta_mix(projected, self.weights, memory, recent, start)
