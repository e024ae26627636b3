"""A control: what another predictor said of the same layer at some other time."""

from __future__ import annotations

import numpy as np

from offmoe.cache.arrays import Ints
from offmoe.cache.predictors.base import NOBODY, Predictor, Shares

KEPT = 256  # predictions a layer


class Shuffled(Predictor):
    """As many guesses, as confident and as often of the same experts, of which only the moment is wrong.

    A predictor that does not beat it knows no more than what is popular. Not asked of the last k tokens alone: one of
    the last KEPT predictions is drawn.
    """

    def __init__(self, inner: Predictor, name: str) -> None:
        super().__init__(inner.trace, name, inner.ahead, inner.least, inner.most)
        self.inner = inner
        self.random = np.random.default_rng(0)
        self.said: dict[int, list[tuple[Ints, Shares]]] = {}

    def seen(self, token: int, layer: int, experts: Ints) -> None:
        self.inner.seen(token, layer, experts)

    def predict(self, token: int, layer: int) -> tuple[Ints, Shares]:
        said = self.said.setdefault(layer, [])
        drawn = said[self.random.integers(len(said))] if said else NOBODY
        experts, likely = self.inner.predict(token, layer)
        if len(said) == KEPT:
            said.pop(0)
        said.append((experts.copy(), likely.copy()))
        return drawn
