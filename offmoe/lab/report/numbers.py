"""Statistics of measurements: means, paired gains with their spread, a linear fit, and agreement with the replay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median, stdev

import numpy as np

from offmoe.lab.live.folder import Cell
from offmoe.lab.live.results import Configuration, Measured
from offmoe.lab.live.truth import TOLERANCE

# Student's t, two-sided 95 %, for 1, 2, … degrees of freedom; beyond these, 2.0.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
Results = dict[Cell, Measured]


def t95(freedom: int) -> float:
    """Return Student's t for a two-sided 95 % interval."""
    return math.inf if freedom < 1 else T95[freedom - 1] if freedom <= len(T95) else 2.0


@dataclass(frozen=True)
class Summary:
    """All rounds of one configuration, including the repeats of a baseline."""

    configuration: Configuration
    rounds: tuple[Measured, ...]

    def mean(self, name: str) -> float:
        """Return the mean of a field per token, rounds weighted by their tokens."""
        return sum(getattr(m, name) * m.tokens for m in self.rounds) / self.tokens

    @property
    def tokens(self) -> int:
        return sum(m.tokens for m in self.rounds)

    @property
    def typical(self) -> Measured:
        """Round with the median time (of two, the faster): insensitive to a machine that was busy for a moment."""
        return sorted(self.rounds, key=lambda measured: measured.ms)[(len(self.rounds) - 1) // 2]

    @property
    def ms(self) -> float:
        return self.typical.ms

    @property
    def range(self) -> tuple[float, float]:
        """Times of the fastest and the slowest round, ms per token."""
        return min(m.ms for m in self.rounds), max(m.ms for m in self.rounds)

    @property
    def slots(self) -> int:
        return self.rounds[0].slots

    @property
    def hits_by_layer(self) -> list[float]:
        known = [m for m in self.rounds if m.hits_by_layer]
        return (
            np.average([m.hits_by_layer for m in known], axis=0, weights=[m.tokens for m in known]).tolist()
            if known
            else []
        )

    @property
    def simulated(self) -> float | None:
        if any(m.simulated is None for m in self.rounds):
            return None
        return self.mean("simulated")

    @property
    def same_misses(self) -> bool | None:
        """True if all observed rounds have the misses of the replay; None if none was observed."""
        seen = [m.same_misses for m in self.rounds if m.same_misses is not None]
        return all(seen) if seen else None

    @property
    def agrees(self) -> bool:
        """True if the replay is within TOLERANCE in every round, or nothing was replayed."""
        return all(m.replay_error <= TOLERANCE for m in self.rounds)


def summaries(results: Results) -> list[Summary]:
    """Return one summary per configuration, in the order of the first measurements."""
    groups: dict[Configuration, list[Measured]] = {}
    for cell, measured in results.items():
        groups.setdefault(cell.configuration, []).append(measured)
    return [Summary(configuration, tuple(group)) for configuration, group in groups.items()]


@dataclass(frozen=True)
class Gain:
    """Time per token saved relative to the baseline, as a share of the baseline's; paired round by round."""

    configuration: Configuration
    baseline: Configuration
    gain: float  # median of the pairs
    spread: float  # 95 %: the larger of the scatter of the pairs and the baseline's difference from itself
    rounds: int

    @property
    def noise(self) -> bool:
        return abs(self.gain) <= self.spread

    @property
    def verdict(self) -> str:
        if self.noise:
            return "noise"
        return "faster" if self.gain > 0 else "slower"

    @property
    def figures(self) -> str:
        return with_spread(self.gain, self.spread)

    def __str__(self) -> str:
        return f"{self.figures}: {self.verdict}"


def with_spread(gain: float, spread: float) -> str:
    return f"{gain:+.1%} " + ("of one round" if math.isinf(spread) else f"± {spread:.1%}")


def paired_gain(times: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """Return (gain, spread) of rounds of (baseline, baseline again, other), in ms per token each."""
    rounds = list(times)
    gains = [1 - other / ((first + again) / 2) for first, again, other in rounds]
    # Baseline against itself: the difference of two runs has twice the variance of one run; a gain has 1.5 times.
    own = math.sqrt(fmean((again / first - 1) ** 2 for first, again, _ in rounds) * 0.75)
    scatter = t95(len(gains) - 1) * stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    return median(gains), max(scatter, t95(len(gains)) * own / math.sqrt(len(gains)))


def gains(results: Results) -> list[Gain]:
    """Compare every configuration with the baseline of its budget."""
    times = {(cell.round, cell.configuration, cell.again): m.ms for cell, m in results.items()}
    baselines = {cell.configuration.vram: cell.configuration for cell in results if cell.again}
    found = []
    for summary in summaries(results):
        own, base = summary.configuration, baselines.get(summary.configuration.vram)
        if base is None or own == base:
            continue
        rounds = [
            (times[round_index, base, False], times[round_index, base, True], time)
            for (round_index, configuration, _), time in times.items()
            if configuration == own and (round_index, base, False) in times and (round_index, base, True) in times
        ]
        if rounds:
            found.append(Gain(own, base, *paired_gain(rounds), len(rounds)))
    return found


@dataclass(frozen=True)
class Drift:
    """Change of a budget's baseline from the beginning to the end of a round."""

    configuration: Configuration
    changes: tuple[float, ...]  # one per round: again ÷ first − 1


def drifts(results: Results) -> list[Drift]:
    """Return the drift of every baseline."""
    times = {(cell.round, cell.configuration, cell.again): m.ms for cell, m in results.items()}
    changes: dict[Configuration, list[float]] = {}
    for (round_index, configuration, again), ms in times.items():
        if again and (round_index, configuration, False) in times:
            changes.setdefault(configuration, []).append(ms / times[round_index, configuration, False] - 1)
    return [Drift(configuration, tuple(found)) for configuration, found in changes.items()]


@dataclass(frozen=True)
class Fit:
    """ms per token ≈ a + b · misses + c · uploads. If uploads equal misses, c is None and b includes both."""

    a: float
    b: float
    c: float | None
    residual: float  # RMS, ms
    points: int

    def __str__(self) -> str:
        text = f"{self.a:.2f} + {self.b:.4f} · misses"
        return text if self.c is None else f"{text} + {self.c:.4f} · uploads"


def fit(points: list[tuple[float, float, float]]) -> Fit | None:
    """Fit (ms, misses, uploads) of configurations by least squares; return None for fewer than five."""
    if len(points) < 5:
        return None
    ms, misses, uploads = np.array(points).T
    ones = np.ones_like(ms)
    columns = [ones, misses, uploads]
    distinguishable = np.abs(uploads - misses).max() > 0.01 * max(misses.max(), uploads.max(), 1e-9)
    if not distinguishable or np.linalg.matrix_rank(np.stack(columns, 1)) < 3:
        columns = columns[:2]
    matrix = np.stack(columns, 1)
    solution = np.linalg.lstsq(matrix, ms, rcond=None)[0]
    residual = float(np.sqrt(np.mean((matrix @ solution - ms) ** 2)))
    a, b, *c = solution.tolist()
    return Fit(a, b, c[0] if c else None, residual, len(points))


def fit_summaries(found: list[Summary]) -> Fit | None:
    return fit([(s.ms, s.mean("misses"), s.mean("uploads")) for s in found])
