"""A score written once, as two expressions: NumPy evaluates them here, and they are plain enough for a kernel."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Policy

# What an expression may use besides + - * / and comparisons: a kernel has all of them.
exp2, log2, sqrt, minimum, maximum = np.exp2, np.log2, np.sqrt, np.minimum, np.maximum


def where(condition: Any, yes: Any, no: Any) -> Any:
    """Choose elementwise, in float32: of two literals NumPy would make float64."""
    return np.where(condition, np.float32(yes), np.float32(no))


class Formula(Policy):
    """A value per record, changed by every use, and what it is worth some tokens later.

    Both are static methods over float32: `value` after the last use (0 before the first), `age` in tokens since then,
    and the policy's parameters by name. A GPU compiles them from their text (offmoe/decode/device_formula.py).
    """

    state: ClassVar[tuple[str, ...]] = ("value", "last")

    def __init_subclass__(cls) -> None:
        if {"touch", "score"} & vars(cls).keys():
            cls.state = ()  # the expressions are not all of it

    @staticmethod
    def use(value: Any, age: Any, uses: Any, **parameters: Any) -> Any:
        """The value after `uses` more uses."""
        return value + uses

    @staticmethod
    @abstractmethod
    def worth(value: Any, age: Any, **parameters: Any) -> Any:
        """The score: the lowest leaves first."""

    def __init__(self, records: int, name: str, **values: int) -> None:
        super().__init__(records, name)
        self.values = {key: np.float32(value) for key, value in values.items()}
        self.value = np.zeros(records, np.float32)
        self.last = np.zeros(records, np.int64)  # token of the last use

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        after = self.use(self.value[records], self._age(records, now), np.asarray(uses, np.float32), **self.values)
        self.value[records] = after
        self.last[records] = now

    def score(self, records: Ints, now: int) -> Numbers:
        worth = self.worth(self.value[records], self._age(records, now), **self.values)
        return np.asarray(worth, np.float32)

    def _age(self, records: Ints, now: int) -> Numbers:
        return (now - self.last[records]).astype(np.float32)
