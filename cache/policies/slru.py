"""Segmented LRU (Karedla et al. 1994): what was used twice is protected from what was used once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Parameter, Policy, Slots

ABOVE = 1 << 40  # more events than any run has


class SLRU(Policy):
    """Score: the event of the last use, protected records above all on probation.

    A hit protects a record; where that makes more than `p` % of a pool protected, the least recently used of them
    go back on probation, as its most recent.
    """

    parameters: ClassVar[Mapping[str, Parameter]] = {"p": Parameter(default=80, low=1, high=99)}

    def __init__(self, records: int, name: str = "slru:p=80", p: int = 80) -> None:
        super().__init__(records, name)
        self.percent = p
        self.last = np.zeros(records, np.int64)  # event
        self.protected = np.zeros(records, np.int32)

    def attach(self, table: Slots) -> None:
        self.table = table
        self.most = table.capacity * self.percent // 100

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        self.event += 1
        self.last[records] = self.event
        self.protected[records] = self.table.slot_of[records] >= 0
        owner = self.table.owner.reshape(self.table.pools, -1)
        inside = (owner >= 0) & (self.protected[owner] > 0)
        for pool in np.flatnonzero(inside.sum(1) > self.most):
            held = owner[pool, inside[pool]]
            oldest = held[self.last[held].argsort(kind="stable")][: len(held) - self.most]
            self.protected[oldest] = 0
            self.last[oldest] = self.event

    def score(self, records: Ints, now: int) -> Numbers:
        return self.last[records] + self.protected[records] * np.int64(ABOVE)
