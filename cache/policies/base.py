"""What a cache policy is: a score over the state that it keeps for every record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from offmoe.cache.residency import Residency
    from offmoe.cache.trace import Trace

Ints = NDArray[np.integer[Any]]
Numbers = NDArray[np.integer[Any] | np.floating[Any]]


@dataclass(frozen=True)
class Parameter:
    """A whole number that a spec may set."""

    default: int
    low: int
    high: int


@dataclass(frozen=True)
class Share:
    """A number from 0 to 1 that a spec may set."""

    default: float


@dataclass(frozen=True)
class File:
    """A path that a spec may set."""

    default: str = ""


Setting = Parameter | Share | File


class Policy(ABC):
    """Who leaves when room is needed: the lowest score; ties go to the lowest slot.

    State is kept per record, so that it outlives eviction, and is made of integers and float32 with a
    fixed order of operations, so that a kernel can compute the same scores bit for bit.
    """

    parameters: ClassVar[Mapping[str, Setting]] = {}
    state: ClassVar[tuple[str, ...]] = ()  # the arrays [records] that a device needs to score alike; none: it cannot
    # True: a missed record enters only where it outscores the victim, which may be one just hit. No engine can serve
    # a miss without a slot yet, so such a policy is for replay only.
    bypass: ClassVar[bool] = False

    def __init__(self, records: int, name: str) -> None:
        self.records = records
        self.name = name  # the canonical spec, "crf:h=64"

    event = 0  # accesses so far, where the score counts them

    @classmethod
    def for_trace(cls, trace: Trace, name: str, **values: Any) -> Self:
        """To replay `trace`, of which a policy for replay may know more than what it is told."""
        return cls(trace.records, name, **values)

    def attach(self, table: Residency) -> None:  # noqa: B027  # most need not know
        """Told once which table it serves: its layers, pools and capacity, and later what lies in it."""

    @abstractmethod
    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        """Distinct `records` [n] are used at token `now`, each `uses` (int, or [n]) times; misses have no slot yet."""

    @abstractmethod
    def score(self, records: Ints, now: int) -> Numbers:
        """Scores [n] of `records` [n] at token `now`, never NaN. A record of -1 may score anything."""
