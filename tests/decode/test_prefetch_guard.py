"""Prefetching that loses is switched off, and what the trials cost stays below one percent."""

from __future__ import annotations

import random

import pytest

from offmoe.decode.prefetch_guard import ROUNDS, WINDOW, Guard

TRIAL = 2 * ROUNDS * WINDOW


def run(
    guard: Guard, steps: int, gain: float, ahead: int = 2, noise: float = 0.05, seed: int = 1
) -> tuple[float, list[bool]]:
    """Time of `steps` steps of 1 s, `gain` as long with prefetching; as many as `ahead` are under way at a time."""
    rng = random.Random(seed)
    used, seconds, waiting = [], 0.0, []
    for _ in range(steps):
        used.append(guard.use())
        waiting.append((gain if used[-1] else 1.0) * rng.uniform(1 - noise, 1 + noise))
        if len(waiting) > ahead:
            guard.observe(waiting.pop(0))
        seconds += waiting[-1]
    return seconds, used


@pytest.mark.parametrize("gain", [1.02, 1.3, 3.0])
def test_a_loser_is_left_off_and_its_trials_cost_less_than_a_percent(gain: float) -> None:
    guard = Guard()
    run(guard, TRIAL + 3, gain)
    seconds, used = run(guard, 40_000, gain, noise=0)
    assert not guard.on
    assert guard.ratio is not None
    assert guard.ratio > 1
    assert seconds < 40_000 * 1.01
    assert any(used), "it is tried again"


def test_a_winner_is_kept() -> None:
    guard = Guard()
    seconds, used = run(guard, 10_000, 0.8)
    assert guard.on
    assert sum(used) > 9_500
    assert seconds < 10_000 * 0.82


def test_no_difference_is_no_gain() -> None:
    """Whatever a trial then decides costs nothing, but it should not look like a gain often."""
    wins = 0
    for seed in range(50):
        guard = Guard()
        run(guard, TRIAL + 3, 1.0, seed=seed)
        wins += guard.on
    assert wins <= 2


def test_windows_interleave() -> None:
    guard = Guard()
    used = [guard.use() for _ in range(TRIAL)]
    assert used == ([False] * WINDOW + [True] * WINDOW) * ROUNDS
