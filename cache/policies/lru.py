"""Least recently used."""

from __future__ import annotations

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Policy


class LRU(Policy):
    """Score: the event of the last use. Events, not tokens, order the layers of one token."""

    state = ("last",)

    def __init__(self, records: int, name: str = "lru") -> None:
        super().__init__(records, name)
        self.event = 0
        self.last = np.zeros(records, np.int64)  # 0: never

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        self.event += 1
        self.last[records] = self.event

    def score(self, records: Ints, now: int) -> Numbers:
        return self.last[records]
