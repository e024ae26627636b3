"""No cache at all: the zero of the scale."""

from __future__ import annotations

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Policy


class NoCache(Policy):
    """Nothing ever enters: every access is on demand."""

    bypass = True

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        """Nothing is kept."""

    def score(self, records: Ints, now: int) -> Numbers:
        return np.full(len(records), -np.inf)  # not above a free slot's
