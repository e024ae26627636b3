"""What a replay of the recorded routing adds to a report: misses over cache sizes, and how well predictors do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offmoe.cache.replay import replay
from offmoe.cache.trace import Trace

BOUNDS = ("belady", "belady-bypass")
SIZES = 9  # of a curve


@dataclass(frozen=True)
class Curve:
    """Misses a token of one policy, from an empty cache, decoded tokens alone."""

    policy: str
    slots: tuple[int, ...]  # a layer
    misses: tuple[float, ...]


def curves(trace: Trace, policies: list[str], scope: str) -> list[Curve]:
    """The policies and, as the bound, Belady, which knows the future; from what a token needs to all experts."""
    experts, k = trace.meta["experts"], trace.meta["top_k"]
    sizes = tuple(int(size) for size in np.unique(np.linspace(k, experts, SIZES).round().astype(int)))
    names = dict.fromkeys([*policies, *BOUNDS])
    return [
        Curve(name, sizes, tuple(replay(trace, name, size, scope).misses_per_token for size in sizes))
        for name in names
    ]  # fmt: skip
