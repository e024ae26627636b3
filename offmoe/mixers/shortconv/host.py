"""Gated short convolution on the CPU, in plain torch: the reference for `device.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.shortconv import ConvWeights, conv_mix
from offmoe.mixers.protocols import Tensors
from offmoe.mixers.recurrent_mixer import RecurrentMixer
from offmoe.mixers.shortconv.config import ShortConvConfig


def load_weights(config: ShortConvConfig, tensors: Tensors) -> ConvWeights:
    """Weights of one layer beyond its projections, float32: the same on the CPU and on a GPU."""
    conv = tensors.load("conv_taps", torch.float32).view(config.conv.channels, config.conv.taps)
    return ConvWeights(config.conv, conv.t().contiguous())


class Host(RecurrentMixer[ConvWeights]):
    """Short convolution of one layer."""

    def __init__(self, config: ShortConvConfig, tensors: Tensors) -> None:
        super().__init__(config, load_weights(config, tensors))

    def _rule(self, projected: Tensor, memory: Tensor, recent: Tensor, start: int) -> Tensor:
        return conv_mix(projected, self.weights, memory, recent, start)
