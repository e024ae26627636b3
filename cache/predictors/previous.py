"""The token before: a negative control, for under LRU all of it is resident already."""

from __future__ import annotations

import numpy as np

from offmoe.cache.arrays import Ints
from offmoe.cache.predictors.base import NOBODY, Predictor, Shares


class Previous(Predictor):
    """Predict the experts of the layer at the sequence's last token, in the router's order, with confidence 1."""

    def predict(self, token: int, layer: int) -> tuple[Ints, Shares]:
        if token in self.trace.offsets:
            return NOBODY
        experts = self.trace.experts[token - 1, layer]
        experts = experts[experts < self.trace.meta["experts"]]
        return experts, np.ones(len(experts))
