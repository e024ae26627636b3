"""Run a trace through the very table and policies of the engine, uploads done at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.policies import OFFLINE
from offmoe.cache.policy import Policy, make_policy
from offmoe.cache.residency import Access, Residency
from offmoe.cache.trace import Trace


@dataclass(frozen=True)
class Outcome:
    """What became of every routed record, [tokens, layers, k] as in the trace."""

    policy: str
    scope: str
    slots: int  # a layer
    hit: NDArray[np.bool_]
    uploaded: NDArray[np.bool_]  # missed and not bypassed

    @property
    def hit_rate(self) -> float:
        return float(self.hit.mean())

    @property
    def hit_rate_by_layer(self) -> NDArray[np.float64]:
        rates: NDArray[np.float64] = self.hit.mean(axis=(0, 2), dtype=np.float64)
        return rates

    @property
    def misses(self) -> int:
        return self.hit.size - int(np.count_nonzero(self.hit))

    @property
    def misses_per_token(self) -> float:
        return self.misses / len(self.hit)

    @property
    def uploads_per_token(self) -> float:
        return int(np.count_nonzero(self.uploaded)) / len(self.hit)


def replay(trace: Trace, policy: str, slots: int, scope: str = "layer") -> Outcome:
    """Every event of the decoded tokens in order, from an empty cache kept over the sequences.

    slots: a layer; under scope "global" the pool holds slots · layers. ValueError: a policy or scope that
    does not exist, or fewer slots than one event needs.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope {scope!r} is unknown: choose layer or global")
    layers, experts, k = (trace.meta[key] for key in ("layers", "experts", "top_k"))
    if slots < k:
        raise ValueError(f"{slots} slots a layer are too few: every token needs {k}")
    table = Residency(layers, experts, slots * layers, policy_for(trace, policy), scope)
    hit = np.empty(trace.experts.size, np.bool_)
    uploaded = np.empty_like(hit)
    end = 0
    for access in accesses(table, trace):
        start, end = end, end + len(access.hit)
        hit[start:end] = access.hit
        uploaded[start:end] = fresh = ~access.hit & (access.slots >= 0)
        table.landed(access.slots[fresh])
    table.check()
    shape = trace.experts.shape
    return Outcome(table.policy.name, scope, slots, hit.reshape(shape), uploaded.reshape(shape))


def accesses(table: Residency, trace: Trace) -> Iterator[Access]:
    """The trace's events in order; under layer scope those of one token together."""
    for now, experts in enumerate(trace.experts):
        if table.scope == "layer":
            yield table.access_token(experts, now)
        else:
            for layer, chosen in enumerate(experts):
                yield table.access(layer, chosen, now)


def policy_for(trace: Trace, spec: str) -> Policy:
    """A policy by name, or Belady with this trace as its future."""
    if spec not in OFFLINE:
        return make_policy(spec, trace.records)
    first = np.arange(trace.meta["layers"])[:, None] * trace.meta["experts"]  # record of a layer's expert 0
    return OFFLINE[spec](trace.records, trace.experts + first, spec)
