"""Layer to layer: who follows whom, counted while it goes on."""

from __future__ import annotations

from typing import Any

import numpy as np

from offmoe.cache.arrays import Ints
from offmoe.cache.predictors.base import NOBODY, Predictor, Shares, first_of
from offmoe.cache.trace import Trace


class Markov(Predictor):
    """How often an expert was asked for d layers behind one of those asked for now; the mean over these."""

    def __init__(self, trace: Trace, name: str, **values: Any) -> None:
        super().__init__(trace, name, **values)
        layers, experts = trace.meta["layers"], trace.meta["experts"]
        self.together = np.zeros((layers, experts, experts), np.float32)  # [layer, d layers before, in the layer]
        self.asked = np.zeros((layers, experts), np.float32)  # of the layer d before
        self.now: dict[int, Ints] = {}  # the present token's experts by layer

    def seen(self, token: int, layer: int, experts: Ints) -> None:
        self.now[layer] = experts
        if layer >= self.ahead:
            before = self.now[layer - self.ahead]
            self.together[layer][np.ix_(before, experts)] += 1
            self.asked[layer, before] += 1

    def predict(self, token: int, layer: int) -> tuple[Ints, Shares]:
        before = self.now[layer - self.ahead]
        before = before[self.asked[layer, before] > 0]
        if not len(before):
            return NOBODY
        return first_of((self.together[layer, before] / self.asked[layer, before, None]).mean(0), self.k)
