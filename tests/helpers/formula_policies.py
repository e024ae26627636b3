"""Formulas to be the same as NumPy and in a kernel: `formula_policies.py:Signed,h=3`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from offmoe.cache.policies.base import Parameter
from offmoe.cache.policies.formula import Formula, exp2, log2, maximum, minimum, sqrt, where
from offmoe.cache.policies.formula import sqrt as root

PATIENCE = 3  # tokens
HERE = str(Path(__file__).resolve())


class Signed(Formula):
    """All that is exact, in odd ways to write it; scores below 0."""

    parameters: ClassVar = {"h": Parameter(default=3, low=1, high=99)}

    @staticmethod
    def use(value: Any, age: Any, uses: Any, h: Any) -> Any:
        """Its docstring."""
        fresh = where(age < PATIENCE, 0.7, 1 / 3)
        value /= 1 + age / h
        return value + root(uses) * fresh

    @staticmethod
    def worth(value: Any, age: Any, *, h: float) -> Any:
        worth = -sqrt(value) * minimum(value, 4) / maximum(age, 2 / 3)
        return worth + (1 - h) / 7


class Plain(Formula):
    """Its uses are counted by the base class."""

    @staticmethod
    def worth(value, age):  # type: ignore[no-untyped-def]
        return value / (age + 1)


class Curved(Formula):
    """What may differ in the last bit."""

    @staticmethod
    def worth(value: Any, age: Any) -> Any:
        return log2(value + 1) * exp2(-age / 7)


class Looped(Formula):
    """No kernel can do this."""

    @staticmethod
    def worth(value: Any, age: Any) -> Any:
        return sum(value / (age + n) for n in range(1, 3))


class Touching(Plain):
    """More than its expressions."""

    def touch(self, records: Any, now: int, uses: Any = 1) -> None:
        super().touch(records, now, uses)
