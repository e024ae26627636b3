"""The offline bound: evict what is needed furthest in the future."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Policy

if TYPE_CHECKING:
    from offmoe.cache.trace import Trace


class Belady(Policy):
    """Score: minus the event of the next use. For replay only: it must be touched as `future` says.

    future: the record ids of a whole run [tokens, layers, k], -1 for none; a token's layer is one event.
    """

    def __init__(self, records: int, future: Ints, name: str = "belady") -> None:
        super().__init__(records, name)
        used = future.reshape(-1)
        events = np.arange(used.size) // future.shape[-1]
        events, used = events[used >= 0], used[used >= 0]
        ends = np.cumsum(np.bincount(used, minlength=records))
        # Every record's events in order, then one that is never reached.
        self.events = np.insert(events[np.argsort(used, kind="stable")], ends, future.size)
        self.next = np.concatenate([[0], ends[:-1]]) + np.arange(records)  # [records], into events

    @classmethod
    def for_trace(cls, trace: Trace, name: str, **values: Any) -> Self:
        return cls(trace.records, records_of(trace), name)

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        self.next[records] += 1

    def score(self, records: Ints, now: int) -> Numbers:
        return -self.events[self.next[records]]


class BeladyBypass(Belady):
    """As Belady, and a missed record needed later than all residents is served without a slot."""

    bypass = True


def records_of(trace: Trace) -> Ints:
    """The records that a trace asks for [tokens, layers, k], int64, -1 where a router chose fewer than k."""
    layers, experts = trace.meta["layers"], trace.meta["experts"]
    ids = trace.experts.astype(np.int64)
    return np.where(ids < experts, ids + np.arange(layers)[:, None] * experts, -1)
