"""Sandwich norms around each part of a layer (Gemma 4), which has a dense FFN next to the routed experts, naive."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offmoe.kernels.norm_rope import rms_norm


@dataclass(frozen=True)
class Sandwich:
    """Weights [H] of a layer's additional norms."""

    attention: Tensor  # of what attention gives
    shared_expert_in: Tensor  # of what the part for every token takes in
    shared_expert: Tensor  # of what it gives
    routed: Tensor  # of what the experts give
    both: Tensor  # of the sum of these two
    scale: Tensor  # [1]: at a layer's end the residual stream is multiplied by it

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())


def fed(x: Tensor, shared_expert: Tensor, routed: Tensor, s: Sandwich, eps: float) -> Tensor:
    """Return the residual stream [T, H] after a layer, from that after its attention and the outputs of FFN and
    experts.
    """
    both = rms_norm(shared_expert.float(), s.shared_expert, eps) + rms_norm(routed.float(), s.routed, eps)
    return ((x + rms_norm(both, s.both, eps)) * s.scale).to(x.dtype)
