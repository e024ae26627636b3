"""Combined recency and frequency (Lee et al. 2001): uses that fade with a half-life."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Parameter, Policy

HALF_LIVES = 64  # kept of a use; beyond, it counts 0. Every product stays ≥ 2^-64: never subnormal


def decay_table(half_life: int) -> NDArray[np.float32]:
    """2^(-age / half_life) for ages 0…64·half_life, the last entry 0: for that age and all beyond."""
    table = np.exp2(-np.arange(HALF_LIVES * half_life + 1) / half_life).astype(np.float32)
    table[-1] = 0
    return table


class CRF(Policy):
    """Score: Σ 2^(-age / h) over all uses, ages in tokens.

    Bit for bit the same anywhere: the decays come from one table, the arithmetic is float32, and the
    product is rounded before the sum (a kernel must not fuse them).
    """

    state: ClassVar[tuple[str, ...]] = ("value", "last")
    parameters: ClassVar[Mapping[str, Parameter]] = {"h": Parameter(default=64, low=1, high=4096)}

    def __init__(self, records: int, name: str = "crf:h=64", h: int = 64) -> None:
        super().__init__(records, name)
        self.decay = decay_table(h)
        self.value = np.zeros(records, np.float32)  # at the last use
        self.last = np.zeros(records, np.int64)  # token of the last use

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        self.value[records] = self.score(records, now) + np.asarray(uses, np.float32)
        self.last[records] = now

    def score(self, records: Ints, now: int) -> Numbers:
        return self.value[records] * self.decay.take(now - self.last[records], mode="clip")
