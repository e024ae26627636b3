"""What `offmoe tune` does: replay says what is promising, live rounds against the default say what is faster.

Successive halving: all candidates run a round each between two runs of the default, the better half goes on. What is
left then runs fresh rounds that chose nothing yet, and only those decide.
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
from offmoe.app.profile import VERSION, machine_name, profile_path, toml
from offmoe.cache.trace import Trace
from offmoe.errors import OffmoeError
from offmoe.lab.live.measure import Bench, Configuration
from offmoe.lab.live.prompts import LEAST
from offmoe.lab.live.truth import Simulator, answers_of
from offmoe.lab.report.numbers import paired, with_spread
from offmoe.lab.trace.prompts import Prompt
from offmoe.plan import Plan
from offmoe.prefetch import NONE
from offmoe.settings import Settings, parse_budget, parse_policy

STEPS = 64  # of a visit
TOKENS = STEPS * LEAST
POLICIES = ("lru", "lfu", "lfru", "slru", "least-stale", "echo", *(f"crf:h={h}" for h in (4, 8, 16, 32, 64, 128)))
GATES = ("gate:d=1,p=0.05,n=2", "gate:d=1,p=0.02,n=2", "gate:d=1,p=0.1,n=2", "gate:d=2,p=0.05,n=2")
PROMISING = 1.01  # times the default's replayed misses: a cheaper policy may be worth a few
MOST = 6  # policies that are measured
FINAL_SHARE = 0.5  # of the time, kept for the rounds that decide
FINAL_ROUNDS = 3, 15  # at least, at most
Say = Callable[[str, float], None]  # what is being done, seconds since the start


@dataclass
class Candidate:
    """What was seen of one configuration."""

    configuration: Configuration
    misses: float | None = None  # a token, replayed; None: a prefetcher, which replay does not judge here
    rounds: list[tuple[float, float, float]] = field(default_factory=list)  # default, default again, this: ms a token
    problem: str | None = None  # why it does not run here

    @property
    def gain(self) -> float:
        return paired(self.rounds)[0] if self.rounds else 0.0


@dataclass(frozen=True)
class Verdict:
    """What tuning ends with. `chosen` is None where the default stays."""

    default: Configuration
    given_vram: str | None
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
    """One tuning, within `minutes`; `say` hears what is being done."""

    def __init__(self, bench: Bench, vram: str | None, minutes: float, say: Say) -> None:
        self.bench, self.given_vram, self.say = bench, vram, say
        self.began, self.seconds = time.perf_counter(), 60 * minutes
        plan = bench.plan_of(bench.base if vram is None else replace(bench.base, vram=parse_budget(vram)))
        self.plan: Plan = plan
        self.default = bench.canonical(vram or str(plan.vram_bytes), None, None)
        self.turn = 0  # of prompts
        self.visits: list[float] = []  # seconds

    def run(self) -> Verdict:
        if self.plan.all_in_slots:
            return self._stays("every record has a slot, so nothing is ever evicted or prefetched")
        candidates = self._candidates(self._trace())
        if not candidates:
            return self._stays("the replay found no policy with as few misses")
        verdict = self._decided(self._halved(candidates))
        return replace(verdict, candidates=tuple(candidates))

    @property
    def visit_s(self) -> float:
        return fmean(self.visits)

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.began

    def _stays(self, why: str) -> Verdict:
        return Verdict(self.default, self.given_vram, self.plan.device.type, None, why)

    def _trace(self) -> Trace:
        """The default's routing; greedy, so every candidate's."""
        self.say("recording", self.spent)
        measured, trace = self.bench.measure(self.default, self.bench.prompts, TOKENS // 2)
        self.visits.append(self.spent * STEPS / measured.tokens)
        return trace

    def _candidates(self, trace: Trace) -> list[Candidate]:
        """Policies that miss about as little as the default or less, fewest first; on a GPU also prefetchers."""
        self.say("replaying", self.spent)
        misses = {name: self._misses(trace, name) for name in self._policies()}
        limit = PROMISING * misses.setdefault(self.default.policy, self._misses(trace, self.default.policy))
        names = sorted((name for name in misses if misses[name] <= limit), key=lambda name: misses[name])
        found = [Candidate(replace(self.default, policy=name), misses[name]) for name in names[:MOST]]
        if self.plan.device.type == "cuda":
            ahead = [Candidate(replace(self.default, prefetch=gate)) for gate in GATES]
            ahead.insert(1, Candidate(replace(self.default, policy=names[0], prefetch=GATES[0])))
            found = [one for pair in zip_longest(ahead, found) for one in pair if one]  # where time is short, of both
        once = {candidate.configuration: candidate for candidate in found}
        return [candidate for configuration, candidate in once.items() if configuration != self.default]

    def _policies(self) -> list[str]:
        """Of POLICIES those that this device runs: a graph has not all of them."""
        names = []
        for policy in POLICIES:
            with suppress(OffmoeError):
                names.append(self.bench.canonical(self.default.vram, policy, None).policy)
        return names

    def _misses(self, trace: Trace, policy: str) -> float:
        simulator = Simulator(
            replace(self.plan, policy=parse_policy(policy)), trace.meta["layers"], trace.meta["experts"]
        )
        outcomes = [simulator.answer(answer) for answer in answers_of(trace, self.plan.chunk)]
        return sum(len(event) for outcome in outcomes for event in outcome.missed) / len(trace.experts)

    def _halved(self, candidates: Sequence[Candidate]) -> Candidate:
        """The one that does best in ever fewer candidates' rounds, as far as the time reaches."""
        left = list(candidates[: max(1, self._visits_left() - 2)])
        while len(left) > 1 and len(left) + 2 <= self._visits_left():
            left = sorted(self._round(left), key=lambda candidate: -candidate.gain)
            left = left[: -(-len(left) // 2)]
        return left[0] if left else candidates[0]

    def _decided(self, candidate: Candidate) -> Verdict:
        """Fresh rounds, their number fixed before: looking and stopping when it pleases would find gains in noise."""
        rounds = min(int((self.seconds - self.spent) / (3 * self.visit_s)), FINAL_ROUNDS[1])
        if rounds < FINAL_ROUNDS[0]:
            needed = (4 + 3 * FINAL_ROUNDS[0]) * self.visit_s / FINAL_SHARE / 60
            raise OffmoeError(f"--minutes {self.seconds / 60:g} are too few here: give at least {needed:.1f}")
        fresh = Candidate(candidate.configuration, candidate.misses)
        for _ in range(rounds):
            if not self._round([fresh]):
                return self._stays(f"{candidate.configuration.method} does not run here: {fresh.problem}")
        gain, spread = paired(fresh.rounds)
        better, method = gain > spread, candidate.configuration.method
        return Verdict(
            default=self.default,
            given_vram=self.given_vram,
            device=self.plan.device.type,
            chosen=candidate.configuration if better else None,
            why=f"{method} takes {gain:.1%} ± {spread:.1%} less time a token"
            if better
            else f"{method} came nearest, {with_spread(gain, spread)}: noise or slower",
            gain=gain,
            spread=spread,
            default_ms=fmean((first + again) / 2 for first, again, _ in fresh.rounds),
            chosen_ms=fmean(own for _, _, own in fresh.rounds),
            rounds=len(fresh.rounds),
        )

    def _round(self, candidates: list[Candidate]) -> list[Candidate]:
        """The default, every candidate, the default again, on the same prompt; those that run here."""
        first, running = self._visit(self.default), []
        times = []
        for candidate in candidates:
            try:
                times.append(self._visit(candidate.configuration))
                running.append(candidate)
            except OffmoeError as error:  # a policy without an expression for the GPU, a predictor without room
                candidate.problem = str(error)
        again = self._visit(self.default)
        for candidate, own in zip(running, times, strict=True):
            candidate.rounds.append((first, again, own))
        self.turn += 1
        return running

    def _visit(self, configuration: Configuration) -> float:
        """ms a token."""
        self.say(configuration.method, self.spent)
        began, prompts = time.perf_counter(), self.bench.prompts
        turn = self.turn % len(prompts)
        measured, _ = self.bench.measure(configuration, prompts[turn:] + prompts[:turn], STEPS)
        self.visits.append(time.perf_counter() - began)
        return measured.ms

    def _visits_left(self) -> int:
        """Before the rounds that decide must begin."""
        return int(((1 - FINAL_SHARE) * self.seconds - self.spent) / self.visit_s)


def tune(path: Path, settings: Settings, vram: str | None, prompts: list[Prompt], minutes: float, say: Say) -> Verdict:
    """Raises OffmoeError; nothing is written."""
    with Bench(path, settings, prompts, TOKENS) as bench:
        return Tuner(bench, vram, minutes, say).run()


def profile_text(model: Path, verdict: Verdict) -> str:
    """The profile as TOML: what the engine is given, and why."""
    settings = {}
    if verdict.chosen:
        settings["policy"] = verdict.chosen.policy
        if verdict.chosen.prefetch != NONE:
            settings["prefetch"] = verdict.chosen.prefetch
    evidence = {
        "vram": verdict.given_vram, "device": verdict.device, "why": verdict.why, "gain": verdict.gain,
        "spread": verdict.spread, "default": verdict.default.method, "default_ms": verdict.default_ms,
        "chosen_ms": verdict.chosen_ms, "rounds": verdict.rounds, "tokens_a_round": STEPS,
    }  # fmt: skip
    lines = ["# What `offmoe tune` measured; chat and run use it. Delete it with `offmoe tune MODEL --forget`."]
    head = {"version": VERSION, "model": model.name, "machine": machine_name(), "date": date.today().isoformat(),
            "offmoe": __version__}  # fmt: skip
    lines += written(head)
    lines += ["", "[settings]", *written(settings), "", "[evidence]", *written(evidence)]
    for candidate in verdict.candidates:
        seen = {"method": candidate.configuration.method, "replayed_misses": candidate.misses,
                "rounds": len(candidate.rounds), "gain": candidate.gain, "problem": candidate.problem}  # fmt: skip
        lines += ["", "[[candidates]]", *written(seen)]
    return "\n".join(lines) + "\n"


def written(values: Mapping[str, object]) -> list[str]:
    """Lines of a table; what is None is left out."""
    return [f"{name} = {toml(value)}" for name, value in values.items() if value is not None]


def forget(model: Path) -> Path | None:
    """Delete the model's profile; None where there is none."""
    path = profile_path(model)
    try:
        path.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OffmoeError(f"cannot delete {path}: {error.strerror}") from None
    return path
