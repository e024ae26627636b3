"""Synthetic routing for tests: skewed like a real router's, and partly reused from token to token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from offmoe.cache.trace import Trace


def synthetic(tokens: int, layers: int, experts: int, k: int, seed: int = 0, sequences: int = 1) -> Trace:
    """Zipf over experts in an order of each layer's own; the last token's choice is favoured."""
    rng = np.random.default_rng(seed)
    liking = -np.log(rng.permuted(np.tile(np.arange(1.0, experts + 1), (layers, 1)), axis=1))
    ids = np.empty((tokens, layers, k), np.uint16)
    recent = np.zeros((layers, experts))
    for token in range(tokens):
        noise = rng.gumbel(size=(layers, experts))
        ids[token] = np.argsort(-(liking + 2 * recent + noise), axis=1)[:, :k]
        recent *= 0.7
        np.put_along_axis(recent, ids[token].astype(np.int64), 1, axis=1)
    meta = {"model": "synthetic", "layers": layers, "experts": experts, "top_k": k, "seed": seed}
    return Trace(ids, np.linspace(0, tokens, sequences + 1).astype(np.int64), meta)


def of(experts: list[list[int]], count: int) -> Trace:
    """One layer that asks for these ids, token by token."""
    ids = np.array(experts, np.uint16)[:, None]
    meta = {"model": "hand", "layers": 1, "experts": count, "top_k": ids.shape[-1]}
    return Trace(ids, np.array([0, len(ids)]), meta)


def seeing(trace: Trace, hidden: int = 8, seed: int = 0) -> Trace:
    """With states and routers, and the experts that these choose; a state is close to the layer's before."""
    rng = np.random.default_rng(seed)
    tokens, layers, k = trace.experts.shape
    steps = rng.normal(size=(tokens, layers, hidden)) * np.where(np.arange(layers) == 0, 1, 0.3)[:, None]
    states = steps.cumsum(1).astype(np.float16)
    gates = rng.normal(size=(layers, trace.meta["experts"], hidden)).astype(np.float16)
    logits = np.einsum("tlh,leh->tle", states.astype(np.float32), gates.astype(np.float32))
    experts = (-logits).argsort(-1, kind="stable")[..., :k].astype(np.uint16)
    return replace(trace, experts=experts, states=states, gates=gates)


if __name__ == "__main__":
    synthetic(1000, 4, 32, 4, seed=7, sequences=5).save("tests/data/small_trace.npz")
