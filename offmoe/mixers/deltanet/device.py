"""Gated DeltaNet on a GPU: a prompt's segment in three launches, a token of the decode step in one."""

from __future__ import annotations

from torch import Tensor

from offmoe.kernels.gpu.deltanet import delta_chunk, delta_step
from offmoe.mixers.deltanet.host import Host
from offmoe.mixers.protocols import StepTensors
from offmoe.mixers.recurrent import LayerState


class Device(Host):
    """DeltaNet of one layer."""

    def _rule(self, projected: Tensor, memory: Tensor, recent: Tensor, start: int) -> Tensor:
        return delta_chunk(projected, self.weights, memory, recent, start)

    def launch(self, projected: Tensor, mixed: Tensor, cache: LayerState, step: StepTensors) -> None:
        delta_step(
            projected[0], self.weights, cache.memory, cache.recent, step.position, step.status, mixed[0],
            ctx=step.ctx, pdl=step.pdl,
        )  # fmt: skip
