"""Run a trace through the very table and policies of the engine, uploads done at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.arrays import Flags
from offmoe.cache.fast import replay_fast
from offmoe.cache.policy import policy_for
from offmoe.cache.residency import Access, Residency
from offmoe.cache.trace import Trace

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Outcome:
    """Outcome of every routed record, [tokens, layers, k] as in the trace."""

    policy: str
    scope: str
    slots: int  # a layer
    asked: Flags  # not padded
    hit: Flags
    uploaded: Flags  # missed and not bypassed

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.routed)

    @property
    def hit_rate_by_layer(self) -> NDArray[np.float64]:
        rates: NDArray[np.float64] = self.hit.sum(axis=(0, 2)) / np.maximum(1, self.asked.sum(axis=(0, 2)))
        return rates

    @property
    def routed(self) -> int:
        return int(np.count_nonzero(self.asked))

    @property
    def hits(self) -> int:
        return int(np.count_nonzero(self.hit))

    @property
    def misses(self) -> int:
        return self.routed - self.hits

    @property
    def misses_per_token(self) -> float:
        return self.misses / len(self.hit)

    @property
    def uploads_per_token(self) -> float:
        return int(np.count_nonzero(self.uploaded)) / len(self.hit)

    def between(self, start: int, stop: int | None = None) -> Outcome:
        """Return the outcome of these tokens alone."""
        some = slice(start, stop)
        return replace(self, asked=self.asked[some], hit=self.hit[some], uploaded=self.uploaded[some])


def replay(trace: Trace, policy: str, slots: int, scope: str = "layer", fast: bool = True) -> Outcome:
    """Every event of the decoded tokens in order, from an empty cache kept over the sequences.

    slots: a layer; under scope "global" the pool holds slots · layers. fast: with the compiled twin of table and
    policy where there is one, which chooses the same. ValueError: a policy or scope that does not exist, or fewer
    slots than one event needs.
    """
    check_pool(trace, slots, scope)
    rule = policy_for(trace, policy)
    asked = trace.experts < trace.meta["experts"]
    found = replay_fast(trace, rule, slots, scope) if fast else None
    hit, uploaded = found or replay_slowly(trace, Residency(*shape(trace, slots), rule, scope))
    return Outcome(rule.name, scope, slots, asked, hit & asked, uploaded & asked)


def check_pool(trace: Trace, slots: int, scope: str) -> None:
    """ValueError where no event could be held."""
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r} is unknown: choose layer or global")
    layers, k = trace.meta["layers"], trace.meta["top_k"]
    if slots * (layers if scope == "global" else 1) < k:
        raise ValueError(f"{slots} slots a layer are too few: every token needs {k}")


def shape(trace: Trace, slots: int) -> tuple[int, int, int]:
    """Layers, experts and slots in all."""
    layers: int = trace.meta["layers"]
    return layers, trace.meta["experts"], slots * layers


def replay_slowly(trace: Trace, table: Residency) -> tuple[Flags, Flags]:
    """Hit and uploaded of every routed record, with the engine's own objects."""
    asked = (trace.experts < trace.meta["experts"]).ravel()
    hit = np.zeros(asked.size, np.bool_)
    uploaded = np.zeros_like(hit)
    places = asked.nonzero()[0]  # the events follow one another in the order of the ids
    end = 0
    for access in accesses(table, trace):
        start, end = end, end + len(access.hit)
        hit[places[start:end]] = access.hit
        uploaded[places[start:end]] = fresh = ~access.hit & (access.slots >= 0)
        table.landed(access.slots[fresh])
    table.check()
    return hit.reshape(trace.experts.shape), uploaded.reshape(trace.experts.shape)


def accesses(table: Residency, trace: Trace) -> Iterator[Access]:
    """The trace's events in order; under layer scope those of one token together, where all are of k."""
    for now, experts in enumerate(trace.experts):
        if table.scope == "layer" and experts.max() < table.experts:
            yield table.access_token(experts, now)
        else:
            for layer, chosen in enumerate(experts):
                yield table.access(layer, chosen[chosen < table.experts], now)
