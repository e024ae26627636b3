"""Gated short convolution on a GPU: one launch for a prompt's segment, and one for a token of the decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.gpu.shortconv import conv_chunk, conv_step
from offmoe.mixers.protocols import DeviceTensors, Scratch, StepTensors
from offmoe.mixers.recurrent import LayerState
from offmoe.mixers.shortconv.config import ShortConvConfig
from offmoe.mixers.shortconv.host import load_weights


class Device:
    """Short convolution of one layer."""

    def __init__(self, config: ShortConvConfig, tensors: DeviceTensors) -> None:
        self.config, self.weights = config, load_weights(config, tensors)

    def tensors(self) -> list[Tensor]:
        return self.weights.tensors()

    def mix(self, projected: Tensor, cache: LayerState, positions: Tensor, start: int) -> Tensor:
        return cache.mix(projected, self.config.mixed, start, self._rule)

    def _rule(self, projected: Tensor, memory: Tensor, recent: Tensor, start: int) -> Tensor:
        return conv_chunk(projected, self.weights, recent, start)

    def scratch(self, ctx: int, sms: int, device: torch.device) -> Scratch:
        return {}

    def launch(self, projected: Tensor, mixed: Tensor, cache: LayerState, step: StepTensors) -> None:
        conv_step(
            projected[0], self.weights, cache.recent, step.position, step.status, mixed[0], ctx=step.ctx, pdl=step.pdl
        )
