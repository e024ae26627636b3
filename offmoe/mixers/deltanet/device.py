"""Gated DeltaNet on a GPU: a prompt's segment in three launches, a token of the decode step in one."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.gpu.deltanet import delta_chunk, delta_step
from offmoe.mixers.deltanet.config import DeltaConfig
from offmoe.mixers.deltanet.host import load_weights
from offmoe.mixers.protocols import DeviceTensors, Scratch, StepTensors
from offmoe.mixers.recurrent import LayerState


class Device:
    """DeltaNet of one layer."""

    def __init__(self, config: DeltaConfig, tensors: DeviceTensors) -> None:
        self.config, self.weights = config, load_weights(config, tensors)

    def tensors(self) -> list[Tensor]:
        return self.weights.tensors()

    def mix(self, projected: Tensor, cache: LayerState, positions: Tensor, start: int) -> Tensor:
        return cache.mix(projected, self.config.mixed, start, self._rule)

    def _rule(self, projected: Tensor, memory: Tensor, recent: Tensor, start: int) -> Tensor:
        return delta_chunk(projected, self.weights, memory, recent, start)

    def scratch(self, ctx: int, sms: int, device: torch.device) -> Scratch:
        return {}

    def launch(self, projected: Tensor, mixed: Tensor, cache: LayerState, step: StepTensors) -> None:
        delta_step(
            projected[0], self.weights, cache.memory, cache.recent, step.position, step.status, mixed[0],
            ctx=step.ctx, pdl=step.pdl,
        )  # fmt: skip
