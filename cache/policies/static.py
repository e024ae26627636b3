"""Static: the hottest records of a profile stay for good. A control, and a warm start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import File, Parameter, Policy, Setting, Slots
from offmoe.cache.trace import Trace

ABOVE = 1 << 40  # more events than any run has


class Static(Policy):
    """Every pool keeps the hottest of its profile, paged in at their first use; nothing else enters."""

    parameters: ClassVar[Mapping[str, Setting]] = {"profile": File()}
    bypass = True

    def __init__(self, records: int, name: str = "static", profile: str = "", uses: Ints | None = None) -> None:
        super().__init__(records, name)
        if uses is None and not profile:
            raise ValueError(f"policy {name!r} needs a profile: write {name.partition(':')[0]}:profile=TRACE.npz")
        self.uses = profiled(profile, records) if uses is None else uses
        self.pinned = np.zeros(records, np.int32)

    @classmethod
    def for_trace(cls, trace: Trace, name: str, **values: Any) -> Self:
        """Without a profile, the first half of the trace itself is one."""
        if values.get("profile"):
            return cls(trace.records, name, **values)
        return cls(trace.records, name, **values, uses=uses_of(trace, max(1, len(trace.experts) // 2)))

    def attach(self, table: Slots) -> None:
        self.pin(table, table.capacity)

    def pin(self, table: Slots, each: int) -> None:
        """The `each` hottest of every pool, the lowest record of equals first."""
        uses = self.uses.reshape(table.pools, -1)
        hottest = (-uses).argsort(axis=1, kind="stable")[:, :each]
        self.pinned[:] = 0
        self.pinned[hottest + np.arange(table.pools)[:, None] * uses.shape[1]] = 1

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        """Do nothing: the pinned records were chosen before."""

    def score(self, records: Ints, now: int) -> Numbers:
        return np.where(self.pinned[records] > 0, 1.0, -np.inf)  # -inf: not above a free slot's


class StaticLRU(Static):
    """The hottest of a profile take `pin` % of every pool; the rest of it is LRU."""

    parameters: ClassVar[Mapping[str, Setting]] = {
        "pin": Parameter(default=50, low=1, high=99),
        "profile": File(),
    }
    bypass = False

    def __init__(
        self, records: int, name: str = "static+lru", profile: str = "", pin: int = 50, uses: Ints | None = None
    ) -> None:
        super().__init__(records, name, profile, uses)
        self.percent = pin
        self.last = np.zeros(records, np.int64)  # event

    def attach(self, table: Slots) -> None:
        self.pin(table, table.capacity * self.percent // 100)

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        self.event += 1
        self.last[records] = self.event

    def score(self, records: Ints, now: int) -> Numbers:
        return self.last[records] + self.pinned[records] * np.int64(ABOVE)


def profiled(path: str, records: int) -> Ints:
    """Uses [records] of the trace in a file; ValueError where that is none, or another model's."""
    trace = Trace.load(path)
    if trace.records != records:
        raise ValueError(
            f"profile {path} is of {trace.records} records and {records} are needed: record it with this model"
        )
    return uses_of(trace, len(trace.experts))


def uses_of(trace: Trace, tokens: int) -> Ints:
    """How often each record is used in the first so many tokens [records]."""
    ids = trace.experts[:tokens].astype(np.int64)
    records = ids + np.arange(ids.shape[1])[:, None] * trace.meta["experts"]
    return np.bincount(records[ids < trace.meta["experts"]], minlength=trace.records)
