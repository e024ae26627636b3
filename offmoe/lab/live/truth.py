"""Replays what an engine was just asked, prompt and steps, through the very table that it uses."""

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

TOLERANCE = 0.01  # of the hit rate: a simulator that is further off is not to be believed


@dataclass
class Answer:
    """One sequence: the chunks that its prompt was run in and the steps that followed, ids [T, layers, k] each."""

    prompt: list[Ints]
    steps: list[Ints]


@dataclass
class Simulated:
    """What the replay says of one answer's steps."""

    hits: Ints  # [layers]
    missed: list[Ints]  # records, an event each


class Simulator:
    """An engine's cache without the engine: uploads are there at once, nothing is prefetched."""

    def __init__(self, plan: Plan, layers: int, experts: int) -> None:
        policy = plan.policy.make(layers * experts)
        self.table = Residency(layers, experts, plan.slots, policy, plan.scope)
        self.clock = 0
        if plan.all_in_slots:  # the engine fills its slots before anybody asks
            for layer in range(layers):
                self._event(layer, np.arange(experts), np.zeros(experts, np.int64))

    def answer(self, answer: Answer) -> Simulated:
        """In the order in which the engine ran it; prompts warm the cache and are not counted."""
        layers = self.table.layers
        self._run(answer.prompt)
        hits, missed = np.zeros(layers, np.int64), list[Ints]()
        for layer, experts, hit in self._run(answer.steps):
            hits[layer] += np.count_nonzero(hit)
            missed.append(layer * self.table.experts + experts[~hit])
        return Simulated(hits, missed)

    def _run(self, passes: Iterable[Ints]) -> list[tuple[int, Ints, NDArray[np.bool_]]]:
        """Every event of the passes: layer, experts and which of them hit."""
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
    """A recorded trace as an engine runs it: every prompt in chunks of so many tokens, then step by step."""
    assert trace.prefill is not None, "a live run records prompts"
    spans = list(zip(pairwise(trace.prompts.tolist()), pairwise(trace.offsets.tolist()), strict=True))
    return [
        Answer(
            [trace.prefill[at : min(at + chunk, end)] for at in range(start, end, chunk)],
            [trace.experts[at : at + 1] for at in range(first, last)],
        )
        for (start, end), (first, last) in spans
    ]


def same(one: list[Ints], other: list[Ints]) -> bool:
    """The same records missed in the same order, event by event."""
    return len(one) == len(other) and all(map(np.array_equal, one, other))
