"""Anybody may leave: the floor of what a cache of this size hits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Parameter, Policy


class Random(Policy):
    """Score: a hash of record, token and seed, so that a run can be repeated."""

    parameters: ClassVar[Mapping[str, Parameter]] = {"seed": Parameter(default=0, low=0, high=2**31 - 1)}

    def __init__(self, records: int, name: str = "random:seed=0", seed: int = 0) -> None:
        super().__init__(records, name)
        self.seed = seed

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        """Nothing is kept."""

    def score(self, records: Ints, now: int) -> Numbers:
        return mixed(np.asarray(records, np.int64) + (now << 32) + (self.seed << 44))


def mixed(numbers: Ints) -> Ints:
    """A hash [n] from 0 to 2^53 - 1 of each (splitmix64, Steele et al. 2014)."""
    z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z >> np.uint64(11)).astype(np.int64)
