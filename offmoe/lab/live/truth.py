"""Replay of an engine's prompts and steps through the same residency table that the engine uses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.residency import Residency
from offmoe.experts.store import Ints, grouped

if TYPE_CHECKING:
    from offmoe.cache.trace import Trace
    from offmoe.plan import Plan

TOLERANCE = 0.01  # largest difference of the hit rates for which the replay is trusted


@dataclass
class Answer:
    """One sequence: the chunks of its prompt and the steps after it, each with ids [T, layers, k]."""

    prompt: list[Ints]
    steps: list[Ints]


@dataclass
class Simulated:
    """Hits and misses of one answer's steps in replay."""

    hits: Ints  # [layers]
    missed: list[Ints]  # record indices of the misses, one array per event


class Simulator:
    """Cache of an engine without the engine: uploads take no time, nothing is prefetched."""

    def __init__(self, plan: Plan, layers: int, experts: int) -> None:
        policy = plan.policy.make(layers * experts)
        self.table = Residency(layers, experts, plan.slots, policy, plan.scope)
        self.clock = 0
        if plan.all_in_slots:  # the engine fills its slots at the start
            for layer in range(layers):
                self._event(layer, np.arange(experts), np.zeros(experts, np.int64))

    def answer(self, answer: Answer) -> Simulated:
        """Replay an answer in the order of the engine; prompts warm the cache and are not counted."""
        layers = self.table.layers
        self._run(answer.prompt)
        hits, missed = np.zeros(layers, np.int64), list[Ints]()
        for layer, experts, hit in self._run(answer.steps):
            hits[layer] += np.count_nonzero(hit)
            missed.append(layer * self.table.experts + experts[~hit])
        return Simulated(hits, missed)

    def _run(self, passes: Iterable[Ints]) -> list[tuple[int, Ints, NDArray[np.bool_]]]:
        """Replay forward passes; return each event's layer, experts, and which of them hit."""
        events = []
        for ids in passes:  # [T, layers, k]
            self.clock += len(ids)
            for layer in range(ids.shape[1]):
                experts, uses, _ = grouped(ids[:, layer].ravel().astype(np.int64))
                for order in self.table.waves(layer, experts, uses):
                    hit = self._event(layer, experts[order], uses[order])
                    events.append((layer, experts[order], hit))
        return events

    def _event(self, layer: int, experts: Ints, uses: Ints) -> NDArray[np.bool_]:
        access = self.table.access(layer, experts, self.clock, uses)
        self.table.landed(access.slots[~access.hit])
        return access.hit


def answers_of(trace: Trace, chunk: int) -> list[Answer]:
    """Return the answers of a trace in the order of an engine: each prompt in chunks of `chunk` tokens, then its
    steps.
    """
    assert trace.prefill is not None, "a live run records prompts"
    spans = list(zip(pairwise(trace.prompts.tolist()), pairwise(trace.offsets.tolist()), strict=True))
    return [
        Answer(
            [trace.prefill[at : min(at + chunk, end)] for at in range(start, end, chunk)],
            [trace.experts[at : at + 1] for at in range(first, last)],
        )
        for (start, end), (first, last) in spans
    ]


def same_events(one: list[Ints], other: list[Ints]) -> bool:
    """Return whether both have the same misses in the same order, event by event."""
    return len(one) == len(other) and all(map(np.array_equal, one, other))
