"""Predictors: which experts a layer will request, predicted some layers earlier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.arrays import Ints
from offmoe.cache.policies.base import Parameter, Setting, Share
from offmoe.cache.trace import Trace

Shares = NDArray[np.floating]
NOBODY: tuple[Ints, Shares] = np.empty(0, np.int64), np.empty(0)


LIMITS: Mapping[str, Setting] = {
    "d": Parameter(default=1, low=1, high=4),  # layers ahead
    "p": Share(default=0.05),  # least confidence
    "n": Parameter(default=2, low=1, high=64),  # records fetched for a layer at most
}


class Predictor(ABC):
    """Asked after the event of layer `layer - d` of a token, for `layer` of the same token.

    It may look at the trace's states of layer - d and before, and at the routing that it was told; nobody checks.
    """

    parameters: ClassVar[Mapping[str, Setting]] = LIMITS

    def __init__(self, trace: Trace, name: str, d: int = 1, p: float = 0.05, n: int = 2) -> None:
        self.trace, self.name = trace, name
        self.ahead, self.least, self.most = d, p, n
        self.k: int = trace.meta["top_k"]

    @abstractmethod
    def predict(self, token: int, layer: int) -> tuple[Ints, Shares]:
        """Distinct experts [m], the likeliest first, and how likely each is [m], from 0 to 1."""

    def seen(self, token: int, layer: int, experts: Ints) -> None:  # noqa: B027  # most need not know
        """Told every event [k], in order, before what it may be asked next."""

    def wanted(self, token: int, layer: int) -> Ints:
        """The experts that are likely enough, the likeliest first."""
        experts, likely = self.predict(token, layer)
        return experts[likely >= self.least]


def first_of(likely: Shares, k: int) -> tuple[Ints, Shares]:
    """The k likeliest of all experts [E], the lowest of equals first."""
    experts = (-likely).argsort(kind="stable")[:k]
    return experts, likely[experts]
