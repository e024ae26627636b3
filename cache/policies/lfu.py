"""Least frequently used, never aged: a control."""

from __future__ import annotations

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Policy


class LFU(Policy):
    """Score: uses since the start."""

    state = ("uses",)

    def __init__(self, records: int, name: str = "lfu") -> None:
        super().__init__(records, name)
        self.uses = np.zeros(records, np.int64)

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        self.uses[records] += uses

    def score(self, records: Ints, now: int) -> Numbers:
        return self.uses[records]
