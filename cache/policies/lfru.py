"""Least frequently and recently used: uses over age."""

from __future__ import annotations

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Policy


class LFRU(Policy):
    """Score: uses ÷ (age + 1), the age in tokens.

    The float64 quotient orders exactly as the integers' cross-multiplication does, while both stay below 2^25.
    """

    state = ("uses", "last")

    def __init__(self, records: int, name: str = "lfru") -> None:
        super().__init__(records, name)
        self.uses = np.zeros(records, np.int64)
        self.last = np.zeros(records, np.int64)  # token of the last use

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        self.uses[records] += uses
        self.last[records] = now

    def score(self, records: Ints, now: int) -> Numbers:
        return self.uses[records] / (now - self.last[records] + 1)
