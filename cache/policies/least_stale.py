"""Least-Stale (Hoang et al. 2026): what the present forward pass went by without touching leaves first."""

from __future__ import annotations

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Policy, Slots

CLASS = 1 << 40  # more events than any run has


class LeastStale(Policy):
    """Score: the class, then the event of the last use, oldest first.

    A pass visits the layers in turn, so the next use of a record is known to be far where its layer has been. Stale is
    what such a layer did not touch; then comes what this pass touched, which is needed in the next one at the earliest;
    then layers to come, for which a prefetch may have brought it. With a pool a layer this is LRU.
    """

    def __init__(self, records: int, name: str = "least-stale") -> None:
        super().__init__(records, name)
        self.last = np.zeros(records, np.int64)  # event
        self.token = np.full(records, -1, np.int64)  # of the last use
        self.reached = 0  # records below it are of layers where this pass has been

    def attach(self, table: Slots) -> None:
        self.experts = table.experts

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        self.event += 1
        self.last[records] = self.event
        self.token[records] = now
        self.reached = (int(records.max()) // self.experts + 1) * self.experts

    def score(self, records: Ints, now: int) -> Numbers:
        touched = self.token[records] == now
        ahead = records >= self.reached
        return self.last[records] + np.where(ahead, 2, np.where(touched, 1, 0)) * np.int64(CLASS)
