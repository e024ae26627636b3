"""Observes an engine while it answers: its routing, its misses, and the time of its parts.

Methods of the engine are wrapped while it is observed, at about 1 µs per call, and restored afterwards; the engine's
own loop has no code for this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from offmoe.cache.residency import Access
from offmoe.engine import Engine
from offmoe.experts.store import Ints
from offmoe.lab.live.truth import Answer
from offmoe.lab.trace.recorder import Recorder


@dataclass
class ObservedAnswer(Answer):
    """An answer, and what was observed of its steps."""

    missed: list[Ints]  # record indices of the misses, one array per event
    hits: Ints  # [layers]
    seconds: dict[str, float]  # time by part of a step


class Probe:
    """A context manager that observes an engine; `run` answers prompts, `recorder` keeps the routing.

    The parts of a step and its misses by layer are observed on the CPU only: on a GPU a step is one launch.
    """

    PARTS = (("attention", "trunk", "attend"), ("router", "trunk", "route"), ("experts", "store", "apply"))

    def __init__(self, engine: Engine) -> None:
        self.engine, self.recorder = engine, Recorder(engine)
        self.sees_steps = engine.plan.device.type == "cpu"
        self._seconds = {part: 0.0 for part, _, _ in self.PARTS}
        self._missed: list[Ints] = []
        self._hits = np.zeros(engine.config.moe_layers, np.int64)
        self._undo = ExitStack()

    def __enter__(self) -> Probe:
        self._undo.enter_context(self.recorder)
        if self.sees_steps:
            for part, owner, method in self.PARTS:
                self._wrap(getattr(self.engine, owner), method, partial(self._wrap_timed, part))
            self._wrap(self.engine.store.table, "access", self._wrap_access)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()

    def run(self, ids: list[int], max_steps: int) -> ObservedAnswer:
        """Answer `ids` greedily in a new conversation, with at most `max_steps` steps after the first token."""
        self.engine.reset()
        before: dict[str, float] = {}
        for _ in self.engine.generate(ids, temperature=0.0, max_tokens=max_steps + 1):
            if not before:  # the first token belongs to the prompt
                before = self._spent()
                self._missed, self._hits = [], np.zeros_like(self._hits)
        after, recorded = self._spent(), self.recorder.answers[-1]
        missed, self._missed = self._missed, []
        hits, self._hits = self._hits, np.zeros_like(self._hits)
        seconds = {part: after[part] - before.get(part, after[part]) for part in after}
        seconds["experts"] -= seconds["page-in"]
        recorded.decoded.flush(self.recorder.dtype)
        steps = [ids[None] for rows in recorded.decoded.ids for ids in rows]
        return ObservedAnswer(recorded.prefill.ids, steps, missed, hits, seconds)

    def _spent(self) -> dict[str, float]:
        return self._seconds | {"page-in": self.engine.store.counters.stall_s}

    def _wrap_access(self, access: Callable[..., Access]) -> Callable[..., Access]:
        experts_of_a_layer = self.engine.config.experts

        def observed_access(layer: int, experts: Ints, *rest: Any) -> Access:
            result = access(layer, experts, *rest)
            self._hits[layer] += np.count_nonzero(result.hit)
            self._missed.append(layer * experts_of_a_layer + experts[~result.hit])
            return result

        return observed_access

    def _wrap_timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments)
            self._seconds[part] += time.perf_counter() - started
            return result

        return timed

    def _wrap(self, owner: object, method: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        setattr(owner, method, wrapper(getattr(owner, method)))
        self._undo.callback(delattr, owner, method)  # uncovers the method of the class
