"""Mixer of a recurrent layer: the projected tokens go through the layer's rule, which carries its state along."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from offmoe.mixers.protocols import Scratch
from offmoe.mixers.recurrent import LayerState, RecurrentConfig


class Weights(Protocol):
    """Weights of one layer beyond its projections."""

    def tensors(self) -> list[Tensor]: ...


W = TypeVar("W", bound=Weights)


class RecurrentMixer(ABC, Generic[W]):
    """Base of `Host` and `Device` of the recurrent mixers."""

    def __init__(self, config: RecurrentConfig, weights: W) -> None:
        self.config, self.weights = config, weights

    def tensors(self) -> list[Tensor]:
        return self.weights.tensors()

    def mix(self, projected: Tensor, cache: LayerState, positions: Tensor, start: int) -> Tensor:
        return cache.mix(projected, self.config.mixed, start, self._rule)

    def scratch(self, ctx: int, sms: int, device: torch.device) -> Scratch:
        """Return no tensors: a step keeps all between its loads and stores in registers."""
        return {}

    @abstractmethod
    def _rule(self, projected: Tensor, memory: Tensor, recent: Tensor, start: int) -> Tensor:
        """Mix the tokens from position `start` on; see `recurrent.Rule`."""
