"""Interface of a cache policy: a score for every record, computed from state kept per record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.trace import Trace


@dataclass(frozen=True)
class Parameter:
    """An integer parameter of a spec, from `low` to `high`."""

    default: int
    low: int
    high: int


@dataclass(frozen=True)
class Share:
    """A float parameter of a spec, from 0 to 1."""

    default: float


@dataclass(frozen=True)
class File:
    """A path parameter of a spec."""

    default: str = ""


Setting = Parameter | Share | File


class Slots(Protocol):
    """Read-only view that a policy has of the residency table (`offmoe.cache.residency.Residency`)."""

    @property
    def layers(self) -> int:
        """MoE layers of the model."""

    @property
    def experts(self) -> int:
        """Experts per layer."""

    @property
    def pools(self) -> int:
        """Pools of slots: one per layer, or one for all layers."""

    @property
    def capacity(self) -> int:
        """Slots per pool."""

    @property
    def owner(self) -> Ints:
        """Record in each slot [pools · capacity], -1: free."""

    @property
    def slot_of(self) -> Ints:
        """Slot of each record [layers · experts], -1: absent."""


class Policy(ABC):
    """Eviction order: the record with the lowest score is evicted first, ties go to the lowest slot.

    State is kept per record, so it outlives eviction. It consists of integers and float32 values with a fixed order of
    operations, so that a kernel can compute the same scores bit for bit.
    """

    parameters: ClassVar[Mapping[str, Setting]] = {}
    state: ClassVar[tuple[str, ...]] = ()  # names of the arrays [records] that a GPU scores from; (): host only
    # True: a missed record is admitted only if it outscores its victim, which may be a record that was just hit. The
    # engine cannot serve a miss without a slot, so such a policy runs in replay only.
    bypass: ClassVar[bool] = False

    def __init__(self, records: int, name: str) -> None:
        self.records = records
        self.name = name  # canonical spec, "crf:h=64"

    event = 0  # accesses so far, for policies whose score counts them

    @classmethod
    def for_trace(cls, trace: Trace, name: str, **values: Any) -> Self:
        """Create the policy to replay `trace`; policies for replay only may look into the trace's future."""
        return cls(trace.records, name, **values)

    def attach(self, table: Slots) -> None:  # noqa: B027  # most policies do not need the table
        """Receive the table that the policy serves, once, before the first access."""

    @abstractmethod
    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        """Record that the distinct `records` [n] are used at token `now`, each `uses` (int or [n]) times.

        Misses are included; they have no slot yet.
        """

    @abstractmethod
    def score(self, records: Ints, now: int) -> Numbers:
        """Return scores [n] of `records` [n] at token `now`, never NaN; the score of record -1 is ignored."""
