"""Miss curves: misses over cache sizes, replayed from the recorded routing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offmoe.cache.replay import replay
from offmoe.cache.trace import Trace

BOUNDS = ("belady", "belady-bypass")
SIZES = 9  # points of a curve


@dataclass(frozen=True)
class Curve:
    """Misses per token of one policy, from an empty cache, decoded tokens only."""

    policy: str
    slots: tuple[int, ...]  # per layer
    misses: tuple[float, ...]


def curves(trace: Trace, policies: list[str], scope: str) -> list[Curve]:
    """Return the curves of `policies` and of Belady's bounds, from the experts of one token to all experts."""
    experts, k = trace.meta["experts"], trace.meta["top_k"]
    sizes = tuple(int(size) for size in np.unique(np.linspace(k, experts, SIZES).round().astype(int)))
    names = dict.fromkeys([*policies, *BOUNDS])
    return [
        Curve(name, sizes, tuple(replay(trace, name, size, scope).misses_per_token for size in sizes)) for name in names
    ]
