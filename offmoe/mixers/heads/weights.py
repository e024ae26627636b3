"""Weights of a layer's heads beyond its projections: the same on the CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offmoe.mixers.heads.config import HeadsConfig
from offmoe.mixers.protocols import Tensors


@dataclass(frozen=True)
class HeadsWeights:
    """Norms and sinks of one layer, and its tables by position."""

    q_norm: Tensor | None  # [D], or [Q] where all heads are normed together
    k_norm: Tensor | None
    sinks: Tensor | None  # [heads]
    rope: Tensor  # [2, ctx, rotary]
    temperature: Tensor | None  # [ctx]: factors of the queries

    def tensors(self) -> list[Tensor]:
        return [weight for weight in (self.q_norm, self.k_norm, self.sinks) if weight is not None]


def load_weights(config: HeadsConfig, tensors: Tensors) -> HeadsWeights:
    """Load what a layer's heads have beyond their projections."""
    q_norm, k_norm = (head_norm(config, tensors, role) for role in ("q_norm", "k_norm"))
    sinks = tensors.load("sinks") if config.sinks else None
    temperature = None
    if config.temperature and not config.rope:
        temperature = tensors.ropes.temperature(config.temperature).to(tensors.dtype)
    return HeadsWeights(q_norm, k_norm, sinks, tensors.ropes.table(config.rope), temperature)


def head_norm(config: HeadsConfig, tensors: Tensors, role: str) -> Tensor | None:
    """Weights of the norm of q or k; "unit" norms rotated heads by ones."""
    if config.qk_norm == "unit" and config.rope:
        return torch.ones(config.head_dim, device=tensors.device, dtype=tensors.dtype)
    return tensors.load(role) if config.normed_by_weights else None
