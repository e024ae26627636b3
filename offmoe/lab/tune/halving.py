"""Tuning: replay selects promising policies, and live rounds against the defaults decide what is faster.

Successive halving: in each round all candidates run between two runs of the default, and the faster half stays. The
last candidate then runs new rounds, which took no part in its selection, and only these decide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

from offmoe import __version__
from offmoe.app.profile import VERSION, machine_name, profile_path, toml_value
from offmoe.cache.trace import Trace
from offmoe.errors import OffmoeError
from offmoe.lab.live.measure import Bench
from offmoe.lab.live.prompts import MIN_PROMPTS
from offmoe.lab.live.results import Configuration
from offmoe.lab.live.truth import Simulator, answers_of
from offmoe.lab.report.numbers import paired_gain, with_spread
from offmoe.lab.trace.prompts import Prompt
from offmoe.plan import Plan
from offmoe.prefetch import NONE
from offmoe.settings import Settings, parse_budget, parse_policy

STEPS = 64  # decoded tokens per measurement
TOKENS = STEPS * MIN_PROMPTS
POLICIES = ("lru", "lfu", "lfru", "slru", "least-stale", "echo", *(f"crf:h={h}" for h in (4, 8, 16, 32, 64, 128)))
GATES = ("gate:d=1,p=0.05,n=2", "gate:d=1,p=0.02,n=2", "gate:d=1,p=0.1,n=2", "gate:d=2,p=0.05,n=2")
MISS_RATIO = 1.01  # relative to the default's replayed misses: a cheaper policy may make up for a few
MAX_POLICIES = 6  # number of policies that are measured
FINAL_SHARE = 0.5  # share of the time reserved for the deciding rounds
FINAL_ROUNDS = 3, 15  # minimum and maximum number
Report = Callable[[str, float], None]  # (current step, seconds since the start)


@dataclass
class Candidate:
    """A configuration and its measurements."""

    configuration: Configuration
    misses: float | None = None  # per token in replay; None: a prefetcher, which is not replayed
    rounds: list[tuple[float, float, float]] = field(default_factory=list)  # ms per token: default, default again, own
    problem: str | None = None  # why it cannot run on this machine

    @property
    def gain(self) -> float:
        return paired_gain(self.rounds)[0] if self.rounds else 0.0


@dataclass(frozen=True)
class Verdict:
    """Result of tuning. `chosen` is None if the default stays."""

    default: Configuration
    vram: str | None
    device: str
    chosen: Configuration | None
    why: str
    gain: float = 0.0
    spread: float = 0.0
    default_ms: float = 0.0
    chosen_ms: float = 0.0
    rounds: int = 0
    candidates: tuple[Candidate, ...] = ()


class Tuner:
    """One tuning run within `minutes`; `report` is called with the current step."""

    def __init__(self, bench: Bench, vram: str | None, minutes: float, report: Report) -> None:
        self.bench, self.vram, self.report = bench, vram, report
        self.started, self.seconds = time.perf_counter(), 60 * minutes
        plan = bench.plan_of(bench.base if vram is None else replace(bench.base, vram=parse_budget(vram)))
        self.plan: Plan = plan
        self.default = bench.canonical(vram or str(plan.vram_bytes), None, None)
        self.prompt_offset = 0  # first prompt of the next measurement
        self.visits: list[float] = []  # seconds per measurement

    def run(self) -> Verdict:
        """Tune and return the verdict."""
        if self.plan.all_in_slots:
            return self._keep_default("every expert has a slot, so nothing is ever evicted or prefetched")
        candidates = self._candidates(self._trace())
        if not candidates:
            return self._keep_default("in replay no policy has as few misses")
        verdict = self._decide(self._halve(candidates))
        return replace(verdict, candidates=tuple(candidates))

    @property
    def visit_s(self) -> float:
        return fmean(self.visits)

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    def _keep_default(self, why: str) -> Verdict:
        return Verdict(self.default, self.vram, self.plan.device.type, None, why)

    def _trace(self) -> Trace:
        """Record the default's routing; decoding is greedy, so it is every candidate's."""
        self.report("recording", self.spent)
        measured, trace = self.bench.measure(self.default, self.bench.prompts, TOKENS // 2)
        self.visits.append(self.spent * STEPS / measured.tokens)
        return trace

    def _candidates(self, trace: Trace) -> list[Candidate]:
        """Return policies with at most about as many misses as the default, fewest first; on a GPU also prefetchers."""
        self.report("replaying", self.spent)
        misses = {name: self._misses(trace, name) for name in self._policies()}
        limit = MISS_RATIO * misses.setdefault(self.default.policy, self._misses(trace, self.default.policy))
        names = sorted((name for name in misses if misses[name] <= limit), key=lambda name: misses[name])
        found = [Candidate(replace(self.default, policy=name), misses[name]) for name in names[:MAX_POLICIES]]
        if self.plan.device.type == "cuda":
            prefetching = [Candidate(replace(self.default, prefetch=gate)) for gate in GATES]
            prefetching.insert(1, Candidate(replace(self.default, policy=names[0], prefetch=GATES[0])))
            found = [
                one for pair in zip_longest(prefetching, found) for one in pair if one
            ]  # alternate, in case time is short
        unique = {candidate.configuration: candidate for candidate in found}
        return [candidate for configuration, candidate in unique.items() if configuration != self.default]

    def _policies(self) -> list[str]:
        """Return those of POLICIES that this device can run: a CUDA graph does not support all."""
        names = []
        for policy in POLICIES:
            with suppress(OffmoeError):
                names.append(self.bench.canonical(self.default.vram, policy, None).policy)
        return names

    def _misses(self, trace: Trace, policy: str) -> float:
        """Return the misses per token of a policy in replay."""
        simulator = Simulator(
            replace(self.plan, policy=parse_policy(policy)), trace.meta["layers"], trace.meta["experts"]
        )
        outcomes = [simulator.answer(answer) for answer in answers_of(trace, self.plan.chunk)]
        return sum(len(event) for outcome in outcomes for event in outcome.missed) / len(trace.experts)

    def _halve(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the candidate that survives the halving rounds, as many as the time allows."""
        left = list(candidates[: max(1, self._visits_left() - 2)])
        while len(left) > 1 and len(left) + 2 <= self._visits_left():
            left = sorted(self._round(left), key=lambda candidate: -candidate.gain)
            left = left[: -(-len(left) // 2)]
        return left[0] if left else candidates[0]

    def _decide(self, candidate: Candidate) -> Verdict:
        """Run new rounds, whose number is fixed in advance: stopping at a good moment would find gains in noise."""
        rounds = min(int((self.seconds - self.spent) / (3 * self.visit_s)), FINAL_ROUNDS[1])
        if rounds < FINAL_ROUNDS[0]:
            needed = (4 + 3 * FINAL_ROUNDS[0]) * self.visit_s / FINAL_SHARE / 60
            raise OffmoeError(
                f"--minutes {self.seconds / 60:g} is too short on this machine: give at least {needed:.1f}"
            )
        fresh = Candidate(candidate.configuration, candidate.misses)
        for _ in range(rounds):
            if not self._round([fresh]):
                return self._keep_default(
                    f"{candidate.configuration.method} cannot run on this machine: {fresh.problem}"
                )
        gain, spread = paired_gain(fresh.rounds)
        better, method = gain > spread, candidate.configuration.method
        return Verdict(
            default=self.default,
            vram=self.vram,
            device=self.plan.device.type,
            chosen=candidate.configuration if better else None,
            why=f"{method} takes {gain:.1%} ± {spread:.1%} less time per token"
            if better
            else f"{method} came closest, {with_spread(gain, spread)}, which is noise or slower",
            gain=gain,
            spread=spread,
            default_ms=fmean((first + again) / 2 for first, again, _ in fresh.rounds),
            chosen_ms=fmean(own for _, _, own in fresh.rounds),
            rounds=len(fresh.rounds),
        )

    def _round(self, candidates: list[Candidate]) -> list[Candidate]:
        """Measure the default, every candidate and the default again on the same prompt; return the candidates that
        ran.
        """
        first, running = self._visit(self.default), []
        times = []
        for candidate in candidates:
            try:
                times.append(self._visit(candidate.configuration))
                running.append(candidate)
            except (
                OffmoeError
            ) as error:  # for example a policy without a GPU implementation, or no room for a prefetcher
                candidate.problem = str(error)
        again = self._visit(self.default)
        for candidate, own in zip(running, times, strict=True):
            candidate.rounds.append((first, again, own))
        self.prompt_offset += 1
        return running

    def _visit(self, configuration: Configuration) -> float:
        """Measure a configuration; return ms per token."""
        self.report(configuration.method, self.spent)
        started, prompts = time.perf_counter(), self.bench.prompts
        prompt_offset = self.prompt_offset % len(prompts)
        measured, _ = self.bench.measure(configuration, prompts[prompt_offset:] + prompts[:prompt_offset], STEPS)
        self.visits.append(time.perf_counter() - started)
        return measured.ms

    def _visits_left(self) -> int:
        """Return the number of measurements possible before the deciding rounds must start."""
        return int(((1 - FINAL_SHARE) * self.seconds - self.spent) / self.visit_s)


def tune(
    path: Path, settings: Settings, vram: str | None, prompts: list[Prompt], minutes: float, report: Report
) -> Verdict:
    """Tune a model. Raises OffmoeError; writes nothing."""
    with Bench(path, settings, prompts, TOKENS) as bench:
        return Tuner(bench, vram, minutes, report).run()


def profile_text(model: Path, verdict: Verdict) -> str:
    """Return the profile as TOML: the settings, and the evidence for them."""
    settings = {}
    if verdict.chosen:
        settings["policy"] = verdict.chosen.policy
        if verdict.chosen.prefetch != NONE:
            settings["prefetch"] = verdict.chosen.prefetch
    evidence = {
        "vram": verdict.vram,
        "device": verdict.device,
        "why": verdict.why,
        "gain": verdict.gain,
        "spread": verdict.spread,
        "default": verdict.default.method,
        "default_ms": verdict.default_ms,
        "chosen_ms": verdict.chosen_ms,
        "rounds": verdict.rounds,
        "tokens_a_round": STEPS,
    }
    lines = ["# Written by `offmoe tune`, used by chat and run. Delete it with `offmoe tune MODEL --forget`."]
    head = {
        "version": VERSION,
        "model": model.name,
        "machine": machine_name(),
        "date": date.today().isoformat(),
        "offmoe": __version__,
    }
    lines += toml_lines(head)
    lines += ["", "[settings]", *toml_lines(settings), "", "[evidence]", *toml_lines(evidence)]
    for candidate in verdict.candidates:
        seen = {
            "method": candidate.configuration.method,
            "replayed_misses": candidate.misses,
            "rounds": len(candidate.rounds),
            "gain": candidate.gain,
            "problem": candidate.problem,
        }
        lines += ["", "[[candidates]]", *toml_lines(seen)]
    return "\n".join(lines) + "\n"


def toml_lines(values: Mapping[str, object]) -> list[str]:
    """Return the lines of a table, without entries that are None."""
    return [f"{name} = {toml_value(value)}" for name, value in values.items() if value is not None]


def forget(model: Path) -> Path | None:
    """Delete the model's profile; return its path, or None if there is none."""
    path = profile_path(model)
    try:
        path.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OffmoeError(f"cannot delete {path}: {error.strerror}") from None
    return path
