"""What a cache policy is: a score over the state that it keeps for every record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Numbers = NDArray[np.integer[Any] | np.floating[Any]]


@dataclass(frozen=True)
class Parameter:
    """A whole number that a policy's spec may set."""

    default: int
    low: int
    high: int


class Policy(ABC):
    """Who leaves when room is needed: the lowest score; ties go to the lowest slot.

    State is kept per record, so that it outlives eviction, and is made of integers and float32 with a
    fixed order of operations, so that a kernel can compute the same scores bit for bit.
    """

    parameters: ClassVar[Mapping[str, Parameter]] = {}
    state: ClassVar[tuple[str, ...]] = ()  # the arrays [records] that a device needs to score alike; none: it cannot
    # True: a missed record enters only where it outscores the victim, which may be one just hit (a bound).
    bypass: ClassVar[bool] = False

    def __init__(self, records: int, name: str) -> None:
        self.records = records
        self.name = name  # the canonical spec, "crf:h=64"

    event = 0  # accesses so far, where the score counts them

    @abstractmethod
    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        """Distinct `records` [n] are used at token `now`, each `uses` (int, or [n]) times."""

    @abstractmethod
    def score(self, records: Ints, now: int) -> Numbers:
        """Scores [n] of `records` [n] at token `now`, never NaN. A record of -1 may score anything."""
