"""Recurrent layers (kernels.recurrent) on the GPU: one token in one launch, or a prompt."""

from __future__ import annotations

from torch import Tensor

from offmoe.kernels.deltanet import DeltaWeights
from offmoe.kernels.gpu.deltanet import delta_chunk, delta_step
from offmoe.kernels.gpu.shortconv import conv_chunk, conv_step
from offmoe.kernels.recurrent import MixerWeights


def mix_step(
    projected: Tensor, w: MixerWeights, memory: Tensor, recent: Tensor, position: Tensor, status: Tensor,
    out: Tensor, *, ctx: int, pdl: bool = False,
) -> None:  # fmt: skip
    """Mix the token at `position` [1]: projected [sum of Mixer.projected] float32 → out [values] float32, striped.

    memory and recent are updated in place unless status [1] is not 0 or the position is `ctx`.
    """
    if isinstance(w, DeltaWeights):
        delta_step(projected, w, memory, recent, position, status, out, ctx=ctx, pdl=pdl)
    else:
        conv_step(projected, w, recent, position, status, out, ctx=ctx, pdl=pdl)


def mix_chunk(projected: Tensor, w: MixerWeights, memory: Tensor, recent: Tensor, start: int) -> Tensor:
    """Mix a prompt's tokens like kernels.recurrent.mix: [T, values] in the type of `projected` [T, …]."""
    if isinstance(w, DeltaWeights):
        return delta_chunk(projected, w, memory, recent, start)
    return conv_chunk(projected, w, recent, start)
