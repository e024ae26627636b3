"""Activation matrices (MoE-Infinity, Xue et al. 2024): the earlier request most like this one says what comes."""

from __future__ import annotations

from typing import Any

import numpy as np

from offmoe.cache.arrays import Ints
from offmoe.cache.predictors.base import NOBODY, Predictor, Shares, first_of
from offmoe.cache.trace import Trace

KEPT = 128  # requests


class Nearest(Predictor):
    """A request is how often each expert of each layer was used; near is a large cosine. The oldest is forgotten."""

    def __init__(self, trace: Trace, name: str, **values: Any) -> None:
        super().__init__(trace, name, **values)
        size = trace.meta["layers"], trace.meta["experts"]
        self.kept = np.zeros((KEPT, *size), np.float32)  # uses a token
        self.direction = np.zeros((KEPT, size[0] * size[1]), np.float32)  # the same, of length 1
        self.count = 0  # of requests that ended
        self.current = np.zeros(size, np.float32)
        self.tokens = 0  # of the current request
        self.likely: Shares | None = None  # [layers, experts] of the nearest

    def seen(self, token: int, layer: int, experts: Ints) -> None:
        if layer == 0:
            if token and token in self.trace.offsets:
                self._end()
            self._look()
            self.tokens += 1
        self.current[layer, experts] += 1

    def predict(self, token: int, layer: int) -> tuple[Ints, Shares]:
        return NOBODY if self.likely is None else first_of(self.likely[layer], self.k)

    def _end(self) -> None:
        place = self.count % KEPT
        self.kept[place] = self.current / self.tokens
        self.direction[place] = self.current.ravel() / np.linalg.norm(self.current)
        self.current[:], self.tokens, self.count = 0, 0, self.count + 1

    def _look(self) -> None:
        """Once a token."""
        known = min(self.count, KEPT)
        if known and self.tokens:
            self.likely = self.kept[(self.direction[:known] @ self.current.ravel()).argmax()]
        elif known:
            self.likely = self.kept[(self.count - 1) % KEPT]
