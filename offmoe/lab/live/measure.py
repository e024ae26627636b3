"""One measurement: the engine answers real prompts in one configuration, and its own routing is replayed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from offmoe.cache.trace import Trace
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.lab.live.probe import Probe
from offmoe.lab.live.prompts import MIN_PROMPTS, encode_prompt
from offmoe.lab.live.results import Configuration, Measured
from offmoe.lab.live.totals import Totals
from offmoe.lab.trace.prompts import Prompt
from offmoe.lab.trace.recorder import Recorder
from offmoe.machine.bandwidth import link_bandwidth, slot_bandwidth
from offmoe.models.model import open_model
from offmoe.plan import Plan, make_plan, pick_device, pick_policy, token_records
from offmoe.prefetch import NONE
from offmoe.settings import Settings, parse_budget, parse_policy, parse_prefetch
from offmoe.text.tokenizer import load_tokenizer

WARM_UP = 8  # steps that are replayed but not counted, while threads start and memory is touched


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
            totals = Totals(engine, probe)
            totals.run(prompts[0], WARM_UP, counted=False)
            for ids in prompts:
                if totals.steps >= quota:
                    break
                totals.run(ids, min(self.max_steps, quota - totals.steps))
            if not totals.steps:
                raise OffmoeError("no answer has more than one token: give other --prompts")
            return totals.measured(configuration), probe.recorder.trace().take(totals.counted)

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
