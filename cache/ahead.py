"""Replay with a predictor, in which copies take time: what prefetching covers, and what it costs.

Time goes on a layer at a time. One link brings records, first come first served, for a started copy cannot be called
back: a miss waits for what was sent for before it. Until it has arrived a record cannot be evicted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.arrays import Flags, Ints
from offmoe.cache.policy import policy_for
from offmoe.cache.predictor import make_predictor
from offmoe.cache.predictors.base import Predictor
from offmoe.cache.replay import Outcome, check_pool, replay, shape
from offmoe.cache.residency import Access, Residency
from offmoe.cache.trace import Trace

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Pace:
    """How long things take, in seconds; 0: none."""

    upload_s: float = 0.0  # a record, over the link
    layer_s: float = 0.0  # a layer in which everything hits: the floor of a token ÷ layers


@dataclass(frozen=True)
class Foresight(Outcome):
    """Outcome of every routed record when a predictor fetched some of them ahead. Late ones do not count as misses."""

    prefetch: str
    late: Flags  # on its way when asked for
    covered: Flags  # of the hits, those that prefetching brought
    base: Outcome  # the same cache without a predictor
    fetched: int  # records
    wasted: int  # of them, evicted unused
    stall_s: Seconds  # [tokens]
    wait_s: float  # in all, for what was late

    @property
    def misses(self) -> int:
        return self.routed - self.hits - int(np.count_nonzero(self.late))

    @property
    def uploads_per_token(self) -> float:
        return (int(np.count_nonzero(self.uploaded)) + self.fetched) / len(self.hit)

    def figures(self) -> dict[str, float | None]:
        """By name; None where there was nothing of the kind.

        coverage: of the misses without prefetching, those that are hits now. precision: of the records fetched, those
        that were asked for. timely: of these, those that had arrived. pollution: hits without prefetching that miss.
        """
        tokens, late = len(self.hit), int(np.count_nonzero(self.late))
        used = late + int(np.count_nonzero(self.covered))
        missed = self.asked & ~self.base.hit
        lost = self.base.hit & ~self.hit & ~self.late
        return {
            "coverage": share(np.count_nonzero(self.covered & missed), np.count_nonzero(missed) if self.fetched else 0),
            "precision": share(used, self.fetched),
            "timely": share(used - late, used),
            "covered_per_token": (used - late) / tokens,
            "late_per_token": late / tokens,
            "late_wait_ms": share(1e3 * self.wait_s, late),
            "fetched_per_token": self.fetched / tokens,
            "wasted_per_token": self.wasted / tokens,
            "pollution_per_token": int(np.count_nonzero(lost)) / tokens,
            "stall_ms_per_token": 1e3 * float(self.stall_s.mean()),
        }


def share(part: float | np.integer, whole: float | np.integer) -> float | None:
    return float(part / whole) if whole else None


def foresee(
    trace: Trace, policy: str, slots: int, scope: str = "layer", prefetch: str = "none", pace: Pace | None = None
) -> Foresight:
    """As `replay`, with the predictor `prefetch` and at `pace`, through the engine's own objects."""
    check_pool(trace, slots, scope)
    table = Residency(*shape(trace, slots), policy_for(trace, policy), scope)
    run = Run(trace, table, make_predictor(prefetch, trace), pace or Pace())
    run.all()
    return Foresight(
        policy=table.policy.name, scope=scope, slots=slots, asked=trace.experts < trace.meta["experts"],
        hit=run.hit, uploaded=run.uploaded, prefetch=run.predictor.name if run.predictor else prefetch,
        late=run.late, covered=run.covered, base=replay(trace, policy, slots, scope), fetched=run.fetched,
        wasted=table.wasted, stall_s=run.stall_s, wait_s=run.wait_s,
    )  # fmt: skip


class Run:
    """A clock, a link, and what is on it."""

    def __init__(self, trace: Trace, table: Residency, predictor: Predictor | None, pace: Pace) -> None:
        self.trace, self.table, self.predictor, self.pace = trace, table, predictor, pace
        self.k: int = trace.meta["top_k"]
        self.now_s = self.link_s = 0.0  # the link is busy until then
        self.flights: deque[tuple[float, int]] = deque()  # when a prefetched record will be there, and its slot
        self.fetched, self.wait_s = 0, 0.0
        self.stall_s = np.zeros(len(trace.experts))
        self.hit, self.uploaded, self.late, self.covered = np.zeros((4, *trace.experts.shape), np.bool_)

    def all(self) -> None:
        for token, layers in enumerate(self.trace.experts.astype(np.int64)):
            for layer, experts in enumerate(layers):
                self._event(token, layer, experts[experts < self.table.experts])
        self.table.check()

    def _event(self, token: int, layer: int, experts: Ints) -> None:
        self._land()
        access = self.table.access(layer, experts, token)
        missed = ~access.hit & ~access.late
        place = token, layer, slice(len(experts))
        self.hit[place], self.late[place], self.covered[place] = access.hit, access.late, access.covered
        self.uploaded[place] = fresh = missed & (access.slots >= 0)
        self._wait(token, access, access.slots[fresh])
        if self.predictor:
            self.predictor.seen(token, layer, experts)
            if layer + self.predictor.ahead < self.table.layers:
                self._prefetch(self.predictor, token, layer + self.predictor.ahead, access.slots[access.slots >= 0])
        self.now_s += self.pace.layer_s

    def _wait(self, token: int, access: Access, demanded: Ints) -> None:
        """For what is late and for what must be brought now."""
        awaited = {*access.slots[access.late].tolist()}
        there = [arrival for arrival, slot in self.flights if slot in awaited]
        self.wait_s += sum(arrival - self.now_s for arrival in there)
        if len(demanded):
            there.append(self._send(len(demanded)))
        stall = max(there, default=self.now_s) - self.now_s
        self.stall_s[token] += stall
        self.now_s += stall
        self.table.landed(demanded)
        self._land()

    def _send(self, records: int) -> float:
        """When the last of them will be there."""
        self.link_s = max(self.now_s, self.link_s) + records * self.pace.upload_s
        return self.link_s

    def _land(self) -> None:
        while self.flights and self.flights[0][0] <= self.now_s:
            self.table.landed(np.array([self.flights.popleft()[1]]))

    def _prefetch(self, predictor: Predictor, token: int, layer: int, held: Ints) -> None:
        most = self._room(layer, predictor)
        if most <= 0:
            return
        _, slots = self.table.prefetch(layer, predictor.wanted(token, layer), token, most, held)
        self.flights += [(self._send(1), slot) for slot in slots.tolist()]
        self.fetched += len(slots)

    def _room(self, layer: int, predictor: Predictor) -> int:
        """How many records leave an event its slots: as the engine's limit, and less what is still on its way."""
        table = self.table
        each = (table.capacity - self.k) // (1 if table.scope == "layer" else predictor.ahead + 1)
        start = layer * table.capacity if table.scope == "layer" else 0
        reserved = np.count_nonzero(table.arriving[start : start + table.capacity])
        if table.scope == "global":
            reserved += sum(map(len, table.guarded.values())) + len(table.leaving)
        return min(predictor.most, self.k, each, table.capacity - self.k - int(reserved))
