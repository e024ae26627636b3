"""Sums over the answers of one measurement."""

from __future__ import annotations

import numpy as np

from offmoe.engine import Engine
from offmoe.lab.live.probe import ObservedAnswer, Probe
from offmoe.lab.live.results import Configuration, Measured
from offmoe.lab.live.truth import Simulated, Simulator, same_events


class Totals:
    """Sums over the answers of one measurement, and their replay."""

    def __init__(self, engine: Engine, probe: Probe) -> None:
        self.engine, self.probe = engine, probe
        config = engine.config
        self.simulator = Simulator(engine.plan, config.moe_layers, config.experts)
        self.steps = self.prompts = 0
        self.counted: list[int] = []  # indices of the trace's sequences that count
        self._sequences = 0  # number of sequences in the trace so far
        self._sums: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._pairs: list[tuple[ObservedAnswer, Simulated]] = []

    def run(self, ids: list[int], max_steps: int, counted: bool = True) -> None:
        """Answer a prompt and replay the answer; warm-up answers are not `counted`."""
        answer = self.probe.run(ids, max_steps)
        simulated = self.simulator.answer(answer)
        if not answer.steps:  # the answer ended with its first token
            return
        self._sequences += 1
        if counted:
            self.counted.append(self._sequences - 1)
            self._pairs.append((answer, simulated))
            self._add(answer)

    def _add(self, answer: ObservedAnswer) -> None:
        """Add an answer. Statistics are means per token, so they are weighted by the answer's steps."""
        stats, steps = self.engine.stats(), len(answer.steps)
        self.steps += steps
        self.prompts += 1
        means = {
            "seconds": 1 / stats.decode_tok_s,
            "hit_rate": stats.hit_rate,
            "covered": stats.covered,
            "late": stats.late,
            "misses": stats.misses_per_token,
            "bytes": stats.pcie_bytes_per_token,
            "stall_ms": stats.stall_ms_per_token,
            "roof_ms": 1e3 / stats.roof.tok_s if stats.roof else 0.0,
            "prompt_s": 1 / stats.prefill_tok_s,
        }
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * steps
        for part, seconds in answer.seconds.items():
            self._parts[part] = self._parts.get(part, 0.0) + seconds

    def measured(self, configuration: Configuration) -> Measured:
        """Return the measurement of all counted answers."""
        engine, plan = self.engine, self.engine.plan
        config, stats = engine.config, engine.stats()
        mean = {name: value / self.steps for name, value in self._sums.items()}
        routed = config.moe_layers * config.top_k
        hits = np.sum([simulated.hits for _, simulated in self._pairs], axis=0)
        simulated = None if plan.prefetch.most else float(hits.sum()) / (routed * self.steps)
        seen = self.probe.sees_steps
        by_layer = np.sum([answer.hits for answer, _ in self._pairs], axis=0) if seen else hits
        known = seen or simulated is not None
        return Measured(
            vram=configuration.vram,
            policy=configuration.policy,
            prefetch=configuration.prefetch,
            slots=plan.slots,
            tokens=self.steps,
            prompts=self.prompts,
            seconds=self._sums["seconds"],
            routed=routed,
            hit_rate=mean["hit_rate"],
            covered=mean["covered"],
            late=mean["late"],
            misses=mean["misses"],
            uploads=mean["bytes"] / (engine.model.record_bytes / plan.records),
            stall_ms=mean["stall_ms"],
            parts=self._parts_ms(mean),
            hits_by_layer=(by_layer / (config.top_k * self.steps)).tolist() if known else [],
            simulated=simulated,
            same_misses=all(same_events(a.missed, s.missed) for a, s in self._pairs) if seen else None,
            roof_ms=mean["roof_ms"],
            roof=stats.roof.limit if stats.roof else "floor",
            token_bytes=engine.trunk.nbytes + routed * plan.real_slot_bytes / plan.slots,
            prompt_tok_s=1 / mean["prompt_s"],
        )

    def _parts_ms(self, mean: dict[str, float]) -> dict[str, float]:
        """Return the parts of a token's time, ms. On a GPU a step is one launch, so only the stall can be separated."""
        total = mean["seconds"] * 1e3
        if not self.probe.sees_steps:
            return {"everything hits": total - mean["stall_ms"], "stall": mean["stall_ms"]}
        parts = {part: seconds / self.steps * 1e3 for part, seconds in self._parts.items()}
        return {**parts, "rest": total - sum(parts.values())}
