"""Which experts a benchmark's tokens are routed to: a random router of random weights would route almost uniformly.

    python -P bench/routing.py            # what the generator reaches, replayed

`realistic` is a generator for Qwen3-30B-A3B (48 layers, top-8 of 128), fitted to its published hit rates under LRU,
one pool a layer, and to the reuse from one token to the next. Every expert's score is the sum of

- a liking that never changes (normal, over experts and layers),
- a topic: AR(1) with a half-life of 390 tokens,
- a passage: AR(1) with a half-life of 10 tokens,
- the kind of word: one of 4, never that of the token before; and a small penalty for having been chosen there. Without
  these two no fit has a hit rate as high at 12.5 % and a reuse as low,
- Gumbel noise, so that the k highest are a draw without replacement from the softmax of the rest.

|                                | published | 4,000 tokens, seed 0, after the first 200 |
|---|---|---|
| LRU hit rate, 16 slots of 128  | 64.7 %    | 64.4 % |
| 32 slots                       | 81.0 %    | 80.8 % |
| 64 slots                       | 91.8 %    | 91.9 % |
| chosen again at the next token | 38–43 %   | 42.5 % |

crf:h=16 hits 62.7, 79.6 and 92.4 %: less than on real traces, where it leads LRU by 2 to 4 points. So a figure taken
with it here is a little low.
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
    """[tokens, layers, k], distinct, in no order; 4,000 tokens take a second or two."""
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
    """One step of an AR(1) whose standard deviation stays `scale`."""
    keep = 0.5 ** (1 / half_life)
    fresh = np.float32(scale * (1 - keep * keep) ** 0.5)
    moved: NDArray[np.float32] = np.float32(keep) * state + fresh * rng.standard_normal(state.shape, np.float32)
    return moved


def uniform(tokens: int, layers: int = 48, experts: int = 128, k: int = 8, seed: int = 0) -> Ids:
    """Every set of k as likely as any other: the worst case for a cache."""
    rng = np.random.default_rng(seed)
    noise = rng.random((tokens, layers, experts), np.float32)
    ids: Ids = np.argpartition(noise, k - 1, axis=-1)[..., :k].astype(np.int16)
    return ids


def from_trace(path: Path | None = None, tokens: int | None = None) -> Ids:
    """The first decoded tokens of a recorded trace; without `path` gpt-oss-20b's, from the folder OFFMOE_TRACES."""
    found = path or Path(os.environ.get("OFFMOE_TRACES", "../shared/traces")) / "gpt-oss-20b.npz"
    if not found.exists():
        raise SystemExit(f"{found} is absent: set OFFMOE_TRACES to the folder that holds it")
    ids = Trace.load(found).experts[:tokens].astype(np.int16)
    if tokens is not None and len(ids) < tokens:
        raise SystemExit(f"{found} holds {len(ids)} tokens: {tokens} were asked for")
    return ids


def predicted(ids: Ids, experts: int, recall: float, precision: float, slots: int, misses: float, seed: int = 0) -> Ids:
    """What a predictor of this quality would name: [tokens, layers, m], padded with -1, ascending.

    Published recall and precision count only records that are not resident, which is not known here: it depends on
    the cache, and on what the predictor itself brings in. So both are reached on average. Every routed record is
    named with probability `recall`, so that share of the misses is named. Of an average layer's experts − slots
    absent records, `misses` are routed to and recall · misses of these are named; so that they are `precision` of all
    absent records named, each record that is not routed to is named with the probability

        recall · misses · (1 / precision − 1) / (experts − slots − misses).

    Those of them that happen to be resident cost nothing. Wrong names are independent of the routing, while a real
    predictor's are near misses that later tokens are more likely to want: this one wastes a little more. It does not
    say which name is the surest.
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
    """Through the engine's own table and policies, uploads done at once."""
    tokens, layers, k = ids.shape
    meta = {"model": "bench", "layers": layers, "experts": experts, "top_k": k}
    return replay(Trace(ids.astype(np.uint16), np.array([0, tokens]), meta), policy, slots, scope)


def reuse(ids: Ids) -> float:
    """Share of a token's experts that the token before had chosen too."""
    return float((ids[1:, :, :, None] == ids[:-1, :, None, :]).any(-1).mean())


if __name__ == "__main__":
    for name, made in (("realistic", realistic(4000)), ("uniform", uniform(1000))):
        rates = [float(replayed(made, 128, "lru", slots).hit[200:].mean()) for slots in (16, 32, 64, 96)]
        print(f"{name:10} lru at 16, 32, 64, 96 slots", *(f"{rate:.1%}" for rate in rates), f"reuse {reuse(made):.1%}")
