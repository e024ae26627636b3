"""One measurement: the engine answers real prompts in one configuration, and its own routing is replayed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offmoe.cache.trace import Trace
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.lab.live.probe import ObservedAnswer, Probe
from offmoe.lab.live.prompts import MIN_PROMPTS, encode_prompt
from offmoe.lab.live.truth import Simulated, Simulator, same_events
from offmoe.lab.trace.prompts import Prompt
from offmoe.lab.trace.recorder import Recorder
from offmoe.machine.bandwidth import link_bandwidth, slot_bandwidth
from offmoe.models.model import open_model
from offmoe.plan import Plan, make_plan, pick_device, pick_policy, token_records
from offmoe.prefetch import NONE
from offmoe.settings import Settings, format_size, parse_budget, parse_policy, parse_prefetch
from offmoe.text.tokenizer import load_tokenizer

WARM_UP = 8  # steps that are replayed but not counted, while threads start and memory is touched


@dataclass(frozen=True)
class Configuration:
    """Settings that are compared, as the user writes them."""

    vram: str  # a percentage, or bytes
    policy: str
    prefetch: str = NONE

    def __str__(self) -> str:
        return f"{self.budget} {self.method}"

    @property
    def budget(self) -> str:
        """Budget for people."""
        return self.vram if self.vram.endswith("%") else format_size(int(self.vram))

    @property
    def method(self) -> str:
        return self.policy if self.prefetch == NONE else f"{self.policy} + {self.prefetch}"


@dataclass(frozen=True)
class Measured:
    """One measurement of a configuration. Rates refer to the routed experts of `tokens` decode steps."""

    vram: str
    policy: str
    prefetch: str
    slots: int  # in all layers
    tokens: int
    prompts: int
    seconds: float  # of all steps
    routed: int  # experts per token, in all layers
    hit_rate: float
    covered: float
    late: float
    misses: float  # per token
    uploads: float  # experts per token copied into slots, including prefetched ones
    stall_ms: float  # per token
    parts: dict[str, float]  # ms per token, as far as they can be measured
    hits_by_layer: list[float]  # measured on the CPU, replayed on a GPU; empty if neither is possible
    simulated: float | None  # hit rate in replay; None: prefetching cannot be replayed without states
    same_misses: bool | None  # whether replay has the same misses in the same order; None: unknown on a GPU
    roof_ms: float
    roof: str  # the limiting resource
    token_bytes: float  # read from fast memory for a token in which every expert hits
    prompt_tok_s: float

    @property
    def configuration(self) -> Configuration:
        return Configuration(self.vram, self.policy, self.prefetch)

    @property
    def ms(self) -> float:
        return self.seconds / self.tokens * 1e3

    @property
    def replay_error(self) -> float:
        """Difference of the replayed hit rate from the measured one; 0 if nothing was replayed."""
        return 0.0 if self.simulated is None else abs(self.simulated - self.hit_rate)

    @property
    def floor_ms(self) -> float:
        return self.ms - self.stall_ms

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """A model and the prompts that every configuration answers. A context manager."""

    def __init__(self, path: Path, base: Settings, prompts: list[Prompt], tokens: int) -> None:
        """`tokens` is the number decoded by all `prompts` together.

        Raises OffmoeError, also if the model has no tokenizer.
        """
        self.path = path
        self.model = open_model(path)
        try:
            self.tokenizer = load_tokenizer(self.model.checkpoint)
        except BaseException:
            self.model.checkpoint.close()
            raise
        self.prompts = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        self.max_steps = -(-tokens // MIN_PROMPTS)  # of one answer: no prompt decodes more than a fifth of the tokens
        needed = max(map(len, self.prompts)) + self.max_steps + 1
        self.base = replace(base, ctx=base.ctx or min(-(-needed // 128) * 128, self.model.config.ctx))
        if needed > self.base.ctx:  # type: ignore[operator]  # set in the line before
            self.close()
            raise OffmoeError(
                f"the longest prompt and its answer need {needed} tokens and the context holds {self.base.ctx}: "
                "give shorter prompts or fewer --tokens"
            )

    def plan(self, configuration: Configuration) -> Plan:
        """Return the plan of a configuration. Raises OffmoeError if it is impossible on this machine."""
        return self.plan_of(self._settings(configuration))

    def plan_of(self, settings: Settings) -> Plan:
        return make_plan(self.model, settings)

    def canonical(self, vram: str, policy: str | None, prefetch: str | None) -> Configuration:
        """Return a configuration in the engine's own notation, so that nothing is measured under two names."""
        name = pick_policy(None if policy is None else parse_policy(policy), pick_device(self.base.device))
        budget = parse_budget(vram)
        exact = str(budget) if budget.bytes is None else str(budget.bytes)
        return Configuration(exact, str(name), str(parse_prefetch(prefetch or NONE)))

    @property
    def smallest(self) -> float:
        """Smallest budget: the experts of one token as a percentage of all experts, rounded up to a tenth."""
        return -(-token_records(self.model) * 1000 // self.model.records) / 10

    def measure(self, configuration: Configuration, prompts: list[list[int]], quota: int) -> tuple[Measured, Trace]:
        """Answer prompts in order, from an empty cache, until `quota` steps are decoded; return the measurement and
        its trace.
        """
        with self.engine(configuration) as engine, Probe(engine) as probe:
            runs = Runs(engine, probe)
            runs.run(prompts[0], WARM_UP, counted=False)
            for ids in prompts:
                if runs.steps >= quota:
                    break
                runs.run(ids, min(self.max_steps, quota - runs.steps))
            if not runs.steps:
                raise OffmoeError("no answer has more than one token: give other --prompts")
            return runs.measured(configuration), probe.recorder.trace().take(runs.counted)

    def states(self, configuration: Configuration, quota: int) -> Trace:
        """Record at least `quota` steps with the routers' inputs, for predictors; slow on a GPU."""
        with self.engine(configuration) as engine, Recorder(engine, states=True) as recorder:
            for ids in self.prompts:
                if recorder.tokens >= quota:
                    break
                engine.reset()
                for _ in engine.generate(ids, temperature=0.0, max_tokens=self.max_steps + 1):
                    pass
            return recorder.trace()

    @contextmanager
    def engine(self, configuration: Configuration) -> Iterator[Engine]:
        """Open an engine and wait until its RAM tier is filled, so that nothing is read in the background."""
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()  # memory of the previous engine would not count as free
        with Engine(open_model(self.path), self._settings(configuration)) as engine:
            engine.tokenizer = self.tokenizer
            if getattr(engine.decoder, "guard", None):  # a GPU with prefetching
                setattr(engine.decoder, "guard", NoGuard())  # noqa: B010
            try:
                if engine.store.ram.whole and not engine.plan.all_in_slots:
                    engine.store.ram.wait_complete()
                yield engine
            finally:
                engine.tokenizer = None  # otherwise the engine would close ours

    def bandwidths(self) -> dict[str, float]:
        """Return the bandwidths of slots and link in bytes/s, for the roof."""
        device = pick_device(self.base.device)
        return {"slots": slot_bandwidth(device), "link": link_bandwidth(device)}

    def close(self) -> None:
        """Close the tokenizer and the checkpoint."""
        self.tokenizer.close()
        self.model.checkpoint.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settings(self, configuration: Configuration) -> Settings:
        return replace(
            self.base,
            vram=parse_budget(configuration.vram),
            policy=parse_policy(configuration.policy),
            prefetch=parse_prefetch(configuration.prefetch),
        )


class NoGuard:
    """Replacement of the prefetch guard, which would turn prefetching off for half of so short a run, or for all of
    it.
    """

    def use(self) -> bool:
        return True

    def observe(self, seconds: float) -> None:
        """Ignore the cost."""


class Runs:
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
