"""Synthetic routing for benchmarks: a random router with random weights would route almost uniformly.

    python -P bench/routing.py            # hit rates of the generator, in replay

`realistic` is a generator for Qwen3-30B-A3B (48 layers, top-8 of 128), fitted to its published hit rates under LRU with
the same number of slots in each layer, and to the reuse from one token to the next. The score of an expert is the sum
of

- a constant preference (normal, over experts and layers), - a topic: AR(1) with a half-life of 390 tokens, - a passage:
AR(1) with a half-life of 10 tokens, - a word class: one of 4, never that of the previous token; and a small penalty for
having been chosen by it. Without these two no fit has both a hit rate as high at 12.5 % and a reuse as low, - Gumbel
noise, so that the k highest are a draw without replacement from the softmax of the other terms.

|                                | published | 4,000 tokens, seed 0, after the first 200 |
|---|---|---|
| LRU hit rate, 16 slots of 128  | 64.7 %    | 64.4 % |
| 32 slots                       | 81.0 %    | 80.8 % |
| 64 slots                       | 91.8 %    | 91.9 % |
| chosen again at the next token | 38–43 %   | 42.5 % |

crf:h=16 hits 62.7, 79.6 and 92.4 %: less than on real traces, where it leads LRU by 2 to 4 points. So results of
crf:h=16 with this generator are a little too low.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.replay import Outcome, replay
from offmoe.cache.trace import Trace

Ids = NDArray[np.int16]
TINY = np.float32(1e-30)
LIKING, TOPIC, TOPIC_HALF, PASSAGE, PASSAGE_HALF = 0.9, 1.8, 390.0, 2.25, 9.66
KIND, KINDS, REPEATED = 0.7, 4, -0.15


def realistic(tokens: int, layers: int = 48, experts: int = 128, k: int = 8, seed: int = 0) -> Ids:
    """Return ids [tokens, layers, k], distinct and unordered; 4,000 tokens take a second or two."""
    rng = np.random.default_rng(seed)
    shape = (layers, experts)
    likings = LIKING * rng.standard_normal(shape, np.float32) + KIND * rng.standard_normal((KINDS, *shape), np.float32)
    topic, passage = (scale * rng.standard_normal(shape, np.float32) for scale in (TOPIC, PASSAGE))
    ids = np.empty((tokens, layers, k), np.int16)
    kind, rows = 0, np.arange(layers)[:, None]
    for token in range(tokens):
        topic = drift(rng, topic, TOPIC, TOPIC_HALF)
        passage = drift(rng, passage, PASSAGE, PASSAGE_HALF)
        kind = (kind + int(rng.integers(1, KINDS))) % KINDS
        noise = -np.log(rng.standard_exponential(shape, np.float32) + TINY)
        score = likings[kind] + topic + passage + noise
        if token:
            score[rows, ids[token - 1]] += REPEATED
        ids[token] = np.argpartition(-score, k - 1, axis=1)[:, :k]
    return ids


def drift(rng: np.random.Generator, state: NDArray[np.float32], scale: float, half_life: float) -> NDArray[np.float32]:
    """Advance an AR(1) process with standard deviation `scale` by one step."""
    keep = 0.5 ** (1 / half_life)
    fresh = np.float32(scale * (1 - keep * keep) ** 0.5)
    moved: NDArray[np.float32] = np.float32(keep) * state + fresh * rng.standard_normal(state.shape, np.float32)
    return moved


def uniform(tokens: int, layers: int = 48, experts: int = 128, k: int = 8, seed: int = 0) -> Ids:
    """Return ids for which every set of k is equally likely: the worst case for a cache."""
    rng = np.random.default_rng(seed)
    noise = rng.random((tokens, layers, experts), np.float32)
    ids: Ids = np.argpartition(noise, k - 1, axis=-1)[..., :k].astype(np.int16)
    return ids


def from_trace(path: Path | None = None, tokens: int | None = None) -> Ids:
    """Return the first decoded tokens of a trace, by default gpt-oss-20b.npz in the folder OFFMOE_TRACES."""
    found = path or Path(os.environ.get("OFFMOE_TRACES", "../shared/traces")) / "gpt-oss-20b.npz"
    if not found.exists():
        raise SystemExit(f"{found} does not exist: set OFFMOE_TRACES to the folder that has it")
    ids = Trace.load(found).experts[:tokens].astype(np.int16)
    if tokens is not None and len(ids) < tokens:
        raise SystemExit(f"{found} has {len(ids)} tokens: {tokens} are needed")
    return ids


def predicted(ids: Ids, experts: int, recall: float, precision: float, slots: int, misses: float, seed: int = 0) -> Ids:
    """Return what a predictor of this quality would name: [tokens, layers, m], padded with -1, ascending.

    Published recall and precision count only experts without a slot. These are not known here: they depend on the cache
    and on what the predictor itself fetches. So both numbers are reached on average. Every routed expert is named with
    probability `recall`, and so is that share of the misses. An average layer has experts − slots experts without a
    slot, `misses` of them are routed to, and recall · misses of these are named. For these to be `precision` of all
    named experts without a slot, each expert that is not routed to is named with the probability

        recall · misses · (1 / precision − 1) / (experts − slots − misses).

    Named experts that have a slot cost nothing. Wrong names are independent of the routing, while those of a real
    predictor are near misses, which later tokens are more likely to use: this one wastes a little more. The names are
    not ranked.
    """
    tokens, layers, _ = ids.shape
    rng = np.random.default_rng(seed)
    absent = max(experts - slots - misses, 1.0)
    wrong = min(recall * misses * (1 / precision - 1) / absent, 1.0)
    named = rng.random((tokens, layers, experts), np.float32) < wrong
    np.put_along_axis(named, ids.astype(np.int64), rng.random(ids.shape, np.float32) < recall, -1)
    counts = named.sum(-1)  # [tokens, layers]
    lists = np.full((tokens, layers, max(int(counts.max()), 1)), -1, np.int16)
    token, layer, expert = np.nonzero(named)
    starts = np.cumsum(counts) - counts.ravel()
    lists[token, layer, np.arange(len(expert)) - np.repeat(starts, counts.ravel())] = expert
    return lists


def replayed(ids: Ids, experts: int, policy: str, slots: int, scope: str = "layer") -> Outcome:
    """Replay ids through the engine's own table and policies; uploads take no time."""
    tokens, layers, k = ids.shape
    meta = {"model": "bench", "layers": layers, "experts": experts, "top_k": k}
    return replay(Trace(ids.astype(np.uint16), np.array([0, tokens]), meta), policy, slots, scope)


def reuse(ids: Ids) -> float:
    """Return the share of a token's experts that the previous token used too."""
    return float((ids[1:, :, :, None] == ids[:-1, :, None, :]).any(-1).mean())


if __name__ == "__main__":
    for name, made in (("realistic", realistic(4000)), ("uniform", uniform(1000))):
        rates = [float(replayed(made, 128, "lru", slots).hit[200:].mean()) for slots in (16, 32, 64, 96)]
        print(f"{name:10} lru at 16, 32, 64, 96 slots", *(f"{rate:.1%}" for rate in rates), f"reuse {reuse(made):.1%}")
