"""One measurement: an engine in one configuration answers real prompts, and its own routing is replayed beside it."""

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
from offmoe.lab.live.probe import Probe, Watched
from offmoe.lab.live.prompts import LEAST, encoded
from offmoe.lab.live.truth import Simulated, Simulator, same
from offmoe.lab.trace.prompts import Prompt
from offmoe.lab.trace.recorder import Recorder
from offmoe.machine.bandwidth import link_bandwidth, slot_bandwidth
from offmoe.models.model import open_model
from offmoe.plan import Plan, make_plan, pick_device, pick_policy, token_records
from offmoe.prefetch import NONE
from offmoe.settings import Settings, format_size, parse_budget, parse_policy, parse_prefetch
from offmoe.text.tokenizer import load_tokenizer

WARM_UP = 8  # steps that are replayed too, but not counted: threads start, memory is touched


@dataclass(frozen=True)
class Configuration:
    """What is compared, as a person writes it."""

    vram: str  # percent, or bytes
    policy: str
    prefetch: str = NONE

    def __str__(self) -> str:
        return f"{self.budget} {self.method}"

    @property
    def budget(self) -> str:
        """For people."""
        return self.vram if self.vram.endswith("%") else format_size(int(self.vram))

    @property
    def method(self) -> str:
        return self.policy if self.prefetch == NONE else f"{self.policy} + {self.prefetch}"


@dataclass(frozen=True)
class Measured:
    """One visit to a configuration. Rates are over the routed records of `tokens` decode steps."""

    vram: str
    policy: str
    prefetch: str
    slots: int  # over all layers
    tokens: int
    prompts: int
    seconds: float  # of the steps
    routed: int  # records a token
    hit_rate: float
    covered: float
    late: float
    misses: float  # a token
    uploads: float  # records a token that moved into slots, prefetched ones included
    stall_ms: float  # a token
    parts: dict[str, float]  # ms a token, as far as they can be seen
    hits_by_layer: list[float]  # measured on the CPU, replayed on a GPU; empty where neither is possible
    simulated: float | None  # hit rate by the replay; None: predictions cannot be replayed without states
    same_misses: bool | None  # the same records in the same order; None: not seen on a GPU
    roof_ms: float
    roof: str  # the resource that sets it
    token_bytes: float  # read from fast memory for a token in which everything hits
    prompt_tok_s: float

    @property
    def configuration(self) -> Configuration:
        return Configuration(self.vram, self.policy, self.prefetch)

    @property
    def ms(self) -> float:
        return self.seconds / self.tokens * 1e3

    @property
    def off(self) -> float:
        """What the replay's hit rate differs by; 0 where nothing was replayed."""
        return 0.0 if self.simulated is None else abs(self.simulated - self.hit_rate)

    @property
    def floor_ms(self) -> float:
        return self.ms - self.stall_ms

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """A model and what is asked of it, the same for every configuration. A context manager."""

    def __init__(self, path: Path, base: Settings, prompts: list[Prompt], tokens: int) -> None:
        """tokens: decoded by all `prompts` together. Raises OffmoeError, also for a model without a tokenizer."""
        self.path = path
        self.model = open_model(path)
        try:
            self.tokenizer = load_tokenizer(self.model.checkpoint)
        except BaseException:
            self.model.checkpoint.close()
            raise
        self.prompts = [encoded(self.tokenizer, prompt) for prompt in prompts]
        self.most = -(-tokens // LEAST)  # steps of one answer: no prompt decodes more than a fifth of the tokens
        needed = max(map(len, self.prompts)) + self.most + 1
        self.base = replace(base, ctx=base.ctx or min(-(-needed // 128) * 128, self.model.config.ctx))
        if needed > self.base.ctx:  # type: ignore[operator]  # it was set in the line before
            self.close()
            raise OffmoeError(
                f"the longest prompt and its answer need {needed} tokens, the context holds {self.base.ctx}: "
                "give shorter prompts or fewer --tokens"
            )

    def plan(self, configuration: Configuration) -> Plan:
        """Raises OffmoeError where the configuration is not possible here."""
        return self.plan_of(self._settings(configuration))

    def plan_of(self, settings: Settings) -> Plan:
        return make_plan(self.model, settings)

    def canonical(self, vram: str, policy: str | None, prefetch: str | None) -> Configuration:
        """As the engine writes it, so that one thing is not measured under two names."""
        name = pick_policy(None if policy is None else parse_policy(policy), pick_device(self.base.device))
        budget = parse_budget(vram)
        exact = str(budget) if budget.bytes is None else str(budget.bytes)
        return Configuration(exact, str(name), str(parse_prefetch(prefetch or NONE)))

    @property
    def smallest(self) -> float:
        """Percent of the routed records that a token needs at once, rounded up to a tenth."""
        return -(-token_records(self.model) * 1000 // self.model.records) / 10

    def measure(self, configuration: Configuration, prompts: list[list[int]], quota: int) -> tuple[Measured, Trace]:
        """Prompts in their order until `quota` steps are decoded, from an empty cache; the trace is of these."""
        with self.engine(configuration) as engine, Probe(engine) as probe:
            runs = Runs(engine, probe)
            runs.run(prompts[0], WARM_UP, counts=False)
            for ids in prompts:
                if runs.steps >= quota:
                    break
                runs.run(ids, min(self.most, quota - runs.steps))
            if not runs.steps:
                raise OffmoeError("no prompt led to more than one token: give other --prompts")
            return runs.measured(configuration), probe.recorder.trace().take(runs.counted)

    def states(self, configuration: Configuration, quota: int) -> Trace:
        """Of `quota` steps or more, what the routers saw beside the routing, for predictors; on a GPU slowly."""
        with self.engine(configuration) as engine, Recorder(engine, states=True) as recorder:
            for ids in self.prompts:
                if recorder.tokens >= quota:
                    break
                engine.reset()
                for _ in engine.generate(ids, temperature=0.0, max_tokens=self.most + 1):
                    pass
            return recorder.trace()

    @contextmanager
    def engine(self, configuration: Configuration) -> Iterator[Engine]:
        """With all that belongs into RAM there, so that no file is read in the background."""
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()  # what the engine before held would not count as free
        with Engine(open_model(self.path), self._settings(configuration)) as engine:
            engine.tokenizer = self.tokenizer
            if getattr(engine.decoder, "guard", None):  # a GPU's that prefetches
                setattr(engine.decoder, "guard", Unguarded())  # noqa: B010
            try:
                if engine.store.ram.whole and not engine.plan.all_in_slots:
                    engine.store.ram.wait_complete()
                yield engine
            finally:
                engine.tokenizer = None  # or the engine would close ours

    def bandwidths(self) -> dict[str, float]:
        """Bytes a second, for the roof."""
        device = pick_device(self.base.device)
        return {"slots": slot_bandwidth(device), "link": link_bandwidth(device)}

    def close(self) -> None:
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


class Unguarded:
    """Stands for the guard of a chat, which would leave prefetching off for half of so short a run, or for good."""

    def use(self) -> bool:
        return True

    def observe(self, seconds: float) -> None:
        """Whatever it costs."""


class Runs:
    """The answers of one visit, summed up, and the replay that runs along."""

    def __init__(self, engine: Engine, probe: Probe) -> None:
        self.engine, self.probe = engine, probe
        config = engine.config
        self.simulator = Simulator(engine.plan, config.moe_layers, config.experts)
        self.steps = self.prompts = 0
        self.counted: list[int] = []  # sequences of the trace
        self._sequences = 0  # of the trace so far
        self._sums: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._pairs: list[tuple[Watched, Simulated]] = []

    def run(self, ids: list[int], most: int, counts: bool = True) -> None:
        answer = self.probe.run(ids, most)
        simulated = self.simulator.answer(answer)
        if not answer.steps:  # it ended with its first token
            return
        self._sequences += 1
        if counts:
            self.counted.append(self._sequences - 1)
            self._pairs.append((answer, simulated))
            self._add(answer)

    def _add(self, answer: Watched) -> None:
        """Stats are means a token; sums can be added up."""
        stats, steps = self.engine.stats(), len(answer.steps)
        self.steps += steps
        self.prompts += 1
        means = {
            "seconds": 1 / stats.decode_tok_s, "hit_rate": stats.hit_rate, "covered": stats.covered,
            "late": stats.late, "misses": stats.misses_per_token, "bytes": stats.pcie_bytes_per_token,
            "stall_ms": stats.stall_ms_per_token, "roof_ms": 1e3 / stats.roof.tok_s if stats.roof else 0.0,
            "prompt_s": 1 / stats.prefill_tok_s,
        }  # fmt: skip
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * steps
        for part, seconds in answer.seconds.items():
            self._parts[part] = self._parts.get(part, 0.0) + seconds

    def measured(self, configuration: Configuration) -> Measured:
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
            same_misses=all(same(a.missed, s.missed) for a, s in self._pairs) if seen else None,
            roof_ms=mean["roof_ms"],
            roof=stats.roof.limit if stats.roof else "floor",
            token_bytes=engine.trunk.nbytes + routed * plan.real_slot_bytes / plan.slots,
            prompt_tok_s=1 / mean["prompt_s"],
        )

    def _parts_ms(self, mean: dict[str, float]) -> dict[str, float]:
        """A token's time by part, ms; a GPU's graph is one launch, and shows only what everything hitting takes."""
        total = mean["seconds"] * 1e3
        if not self.probe.sees_steps:
            return {"everything hits": total - mean["stall_ms"], "stall": mean["stall_ms"]}
        parts = {part: seconds / self.steps * 1e3 for part, seconds in self._parts.items()}
        return {**parts, "rest": total - sum(parts.values())}
