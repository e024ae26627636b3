"""Gated short convolution on a GPU: one launch for a prompt's segment, and one for a token of the decode step."""

from __future__ import annotations

from torch import Tensor

from offmoe.kernels.gpu.shortconv import conv_chunk, conv_step
from offmoe.mixers.protocols import StepTensors
from offmoe.mixers.recurrent import LayerState
from offmoe.mixers.shortconv.host import Host


class Device(Host):
    """Short convolution of one layer."""

    def _rule(self, projected: Tensor, memory: Tensor, recent: Tensor, start: int) -> Tensor:
        return conv_chunk(projected, self.weights, recent, start)

    def launch(self, projected: Tensor, mixed: Tensor, cache: LayerState, step: StepTensors) -> None:
        conv_step(
            projected[0], self.weights, cache.recent, step.position, step.status, mixed[0], ctx=step.ctx, pdl=step.pdl
        )
