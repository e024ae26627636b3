"""Gate-ahead: a later layer's norm and router on the present hidden state."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.arrays import Ints
from offmoe.cache.predictors.base import Predictor, Shares
from offmoe.cache.trace import Trace


class Scored(Predictor):
    """From a state to the logits of all experts, their softmax, and of it the k likeliest, a layer at a time."""

    def __init__(self, trace: Trace, name: str, **values: Any) -> None:
        super().__init__(trace, name, **values)
        if trace.states is None:
            raise ValueError(f"{name!r} needs the hidden states and the trace has none: record it with --states")
        self.ranked: dict[int, tuple[Ints, Shares]] = {}  # layer → [tokens, k] each

    @abstractmethod
    def logits(self, layer: int) -> NDArray[np.float32]:
        """[tokens, experts] of `layer`, out of the states of layer - ahead."""

    def predict(self, token: int, layer: int) -> tuple[Ints, Shares]:
        if layer not in self.ranked:
            self.ranked[layer] = likeliest(self.logits(layer), self.k)
        experts, likely = self.ranked[layer]
        return experts[token], likely[token]

    def before(self, layer: int) -> NDArray[np.float32]:
        """The states [tokens, H] of layer - ahead."""
        assert self.trace.states is not None
        return self.trace.states[:, layer - self.ahead].astype(np.float32)


class Gate(Scored):
    """As the decode step on a GPU does it."""

    def __init__(self, trace: Trace, name: str, **values: Any) -> None:
        super().__init__(trace, name, **values)
        if trace.gates is None:
            raise ValueError(f"{name!r} needs the routers and the trace has none: record it with --states")
        self.gates = trace.gates

    def logits(self, layer: int) -> NDArray[np.float32]:
        return self.before(layer) @ self.gates[layer].T.astype(np.float32)


def likeliest(logits: NDArray[np.float32], k: int) -> tuple[Ints, Shares]:
    """The k highest of logits [tokens, experts], the lowest of equals first, and their softmax over all."""
    experts = (-logits).argsort(axis=1, kind="stable")[:, :k]
    power = np.exp(logits - logits.max(1, keepdims=True))
    return experts, np.take_along_axis(power / power.sum(1, keepdims=True), experts, 1)
