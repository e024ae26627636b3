"""A linear map is fitted, evaluated on held-out sequences, and read by replay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_traces import synthetic

from offmoe.cache.predictor import make_predictor
from offmoe.cache.trace import Trace
from offmoe.lab.trace.fit import LinearMap, evaluate, fit_map, recalls, top

TOKENS, LAYERS, HIDDEN, EXPERTS, K = 400, 4, 24, 16, 3


def with_states(noise: float = 0.0, seed: int = 0, sequences: int = 8) -> Trace:
    """Return a trace whose hidden state each layer rotates a little; the gates are one layer late."""
    rng = np.random.default_rng(seed)
    model = np.random.default_rng(99)
    stream = rng.normal(size=(TOKENS, HIDDEN))
    states, logits, gates = [], [], []
    for _ in range(LAYERS):
        stream = stream @ (np.eye(HIDDEN) + 0.25 * model.normal(size=(HIDDEN, HIDDEN)))
        stream /= np.sqrt((stream**2).mean(1, keepdims=True))
        gate = model.normal(size=(EXPERTS, HIDDEN))
        states.append(stream)
        logits.append(stream @ gate.T + noise * rng.normal(size=(TOKENS, EXPERTS)))
        gates.append(gate)
    chosen = np.argsort(-np.stack(logits, 1), axis=2)[..., :K].astype(np.uint8)
    meta = {"model": "made", "layers": LAYERS, "experts": EXPERTS, "top_k": K}
    return Trace(chosen, np.linspace(0, TOKENS, sequences + 1).astype(np.int64), meta,
                 states=np.stack(states, 1).astype(np.float16), logits=np.stack(logits, 1).astype(np.float16),
                 gates=np.stack(gates).astype(np.float16))  # fmt: skip


def test_a_linear_stream_is_learned() -> None:
    judged = fit_map(with_states(), None, 1, None).meta["judged"]
    assert judged["map"]["recall_at_k"] > 0.9
    assert judged["map"]["recall_at_k"] > judged["gate-ahead"]["recall_at_k"] + 0.1
    assert judged["gate-ahead"]["recall_at_k"] > judged["map, tokens shuffled"]["recall_at_k"] + 0.1
    assert judged["map, tokens shuffled"]["recall_at_k"] == pytest.approx(K / EXPERTS, abs=0.06), "dice"
    assert judged["previous token"]["recall_of_new"] == 0
    assert judged["map"]["precision_likely"] > 0.9


def test_noise_is_not_learned() -> None:
    """Evaluated on its own training tokens, a map of noise would look good."""
    trace = with_states()
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(*trace.experts.shape[:2], EXPERTS))
    noise = replace(trace, logits=logits.astype(np.float16), experts=np.argsort(-logits, 2)[..., :K].astype(np.uint8))
    assert fit_map(noise, None, 1, 0.001).meta["judged"]["map"]["recall_at_k"] == pytest.approx(K / EXPERTS, abs=0.05)


def test_sequences_that_judge_are_not_trained_on() -> None:
    """Damaging the held-out sequences does not change the map."""
    trace = with_states(sequences=8)
    assert trace.states is not None
    spoilt = trace.states.copy()
    for sequence in (3, 7):
        spoilt[trace.offsets[sequence] : trace.offsets[sequence + 1]] = 0
    one, two = fit_map(trace, None, 1, 0.1), fit_map(replace(trace, states=spoilt), None, 1, 0.1)
    assert np.array_equal(one.weights, two.weights)
    assert one.meta["judged"] != two.meta["judged"]
    assert one.meta["judged_on"] == {"tokens": 100, "sequences": 2}


def test_another_trace_may_judge() -> None:
    linear = fit_map(with_states(), with_states(seed=7), 1, 0.01)
    assert linear.meta["trained_on"]["tokens"] == linear.meta["judged_on"]["tokens"] == TOKENS
    assert linear.meta["judged"]["map"]["recall_at_k"] > 0.9


def test_recall_by_hand() -> None:
    """Two of the first three are right, in the one layer that has a previous layer."""
    ids = np.array([[[0, 1, 2], [0, 1, 2]]], np.uint8)
    trace = Trace(ids, np.array([0, 1]), {"model": "m", "layers": 2, "experts": 5, "top_k": 3},
                  states=np.ones((1, 2, 1), np.float16), logits=np.zeros((1, 2, 5), np.float16))  # fmt: skip
    weights = np.array([[[0] * 5], [[9, 8, 0, 7, 0]]], np.float16)
    linear = LinearMap(weights, np.zeros((2, 5), np.float16), 1, {})
    assert recalls(linear, trace) == [pytest.approx(2 / 3)]
    row = evaluate(linear, trace, trace)["map"]
    assert row["recall_at_k"] == pytest.approx(2 / 3)
    assert (row["precision_likely"], row["recall_likely"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_the_first_token_of_a_sequence_has_none_before_it() -> None:
    """So none of its experts is new."""
    trace = with_states(sequences=TOKENS)
    linear = fit_map(trace, None, 1, 0.1)
    assert evaluate(linear, trace, trace)["map"]["recall_of_new"] == 0
    assert evaluate(linear, trace, with_states(sequences=8))["map"]["recall_of_new"] > 0.9


@pytest.mark.parametrize("ahead", [1, 2])
def test_replay_reads_the_map(ahead: int, tmp_path: Path) -> None:
    trace = with_states()
    linear = fit_map(trace, None, ahead, 0.1)
    linear.save(tmp_path / "map.npz")
    predictor = make_predictor(f"linear:map={tmp_path / 'map.npz'},n=3", trace)
    assert predictor is not None
    assert predictor.ahead == ahead
    for layer in range(ahead, LAYERS):
        want = top(linear.logits(trace, layer), K)
        assert np.array_equal(predictor.predict(17, layer)[0], want[17])
    with np.load(tmp_path / "map.npz") as file:
        assert file["weights"].dtype == np.float16
        assert json.loads(str(file["meta"]))["judged"] == linear.meta["judged"]
    assert not linear.weights[:ahead].any(), "there is no layer before"


def test_what_cannot_be_learned_is_refused() -> None:
    trace = with_states()
    other = synthetic(20, 3, 16, 3)
    narrow = replace(trace, states=trace.states[..., :5], gates=None)  # type: ignore[index]
    few = with_states(sequences=3)
    for arguments, words in (
        ((synthetic(20, 2, 8, 2), None, 1, None), "synthetic has no states: record it with --states"),
        ((trace, other, 1, None), "no states"),
        ((trace, replace(trace, meta={**trace.meta, "top_k": 2}, experts=trace.experts[..., :2]), 1, None),
         "the trace is of made, 4 layers of 16 experts, top 2, and made has 4 layers of 16 experts, top 3"),
        ((trace, narrow, 1, None), "states of 5 numbers cannot evaluate a map of 24"),
        ((trace, None, 4, None), "4 layers ahead are too many: the model has 4"),
        ((few, None, 1, 0.1), "3 sequences are too few"),
        ((trace, None, 1, 0.0), "ridge is 0: expected a number above 0"),
        ((trace, None, 1, float("nan")), "ridge is nan"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            fit_map(*arguments)  # type: ignore[arg-type]
        assert words in str(caught.value)
