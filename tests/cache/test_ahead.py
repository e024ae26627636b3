"""Predictors and copies that take time: by hand, against the plain replay, and what a person may write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import DATA
from synthetic_traces import of, seeing, synthetic

from offmoe.cache.ahead import Foresight, Pace, foresee
from offmoe.cache.predictor import make_predictor
from offmoe.cache.predictors import PREDICTORS
from offmoe.cache.predictors.base import Predictor
from offmoe.cache.replay import replay
from offmoe.cache.trace import Trace

PAD = 2**16 - 1


def layered(*tokens: list[list[int]], experts: int = 3, starts: tuple[int, ...] = (0,)) -> Trace:
    """Tokens of layers of experts."""
    ids = np.array(tokens, np.uint16)
    meta = {"model": "hand", "layers": ids.shape[1], "experts": experts, "top_k": ids.shape[2]}
    return Trace(ids, np.array([*starts, len(ids)]), meta)


def told(trace: Trace, spec: str) -> list[list[list[int]]]:
    """What a predictor says [tokens][layers ≥ d], told of every event first."""
    predictor = make_predictor(spec, trace)
    assert predictor is not None
    said = []
    for token, layers in enumerate(trace.experts.astype(np.int64)):
        said.append([])
        for layer, experts in enumerate(layers):
            predictor.seen(token, layer, experts[experts < trace.meta["experts"]])
            if layer + predictor.ahead < len(layers):
                said[-1].append(predictor.wanted(token, layer + predictor.ahead).tolist())
    return said


HAND = layered([[0], [0]], [[0], [1]], [[1], [0]])


def test_copies_take_time_by_hand() -> None:
    """Upload 3, layer 1. Token 0: miss 3, sent for at 3 and there at 6, asked for at 4. Token 1: sent at 7, asked at 8.

    Token 2: a miss of 3; nothing to fetch.
    """
    outcome = foresee(HAND, "lru", 2, prefetch="oracle:n=1", pace=Pace(3, 1))
    assert outcome.stall_s.tolist() == [5, 2, 3]
    assert outcome.hit[..., 0].tolist() == [[False, False], [True, False], [False, True]]
    assert outcome.late[..., 0].tolist() == [[False, True], [False, True], [False, False]]
    assert (outcome.misses, outcome.fetched, outcome.wait_s, outcome.uploads_per_token) == (2, 2, 4, 4 / 3)
    assert outcome.figures() == pytest.approx({
        "coverage": 0, "precision": 1, "timely": 0, "covered_per_token": 0, "late_per_token": 2 / 3,
        "late_wait_ms": 2000, "fetched_per_token": 2 / 3, "wasted_per_token": 0, "pollution_per_token": 0,
        "stall_ms_per_token": 1e4 / 3,
    })  # fmt: skip


def test_what_arrives_in_time_is_covered() -> None:
    outcome = foresee(HAND, "lru", 2, prefetch="oracle:n=1", pace=Pace(0.5, 1))
    assert outcome.stall_s.tolist() == [0.5, 0, 0.5]
    assert outcome.covered[..., 0].tolist() == [[False, True], [False, True], [False, False]]
    figures = outcome.figures()
    assert (figures["coverage"], figures["precision"], figures["timely"]) == (0.5, 1, 1)
    assert figures["late_wait_ms"] is None


def always_two(folder: Path) -> str:
    path = folder / "mine.py"
    path.write_text(
        "from offmoe.cache.predictors.base import Predictor\n"
        "class Two(Predictor):\n    def predict(self, token, layer):\n        return [2], [1.0]\n"
    )
    return f"{path}:Two"


def test_waste_and_pollution_by_hand(tmp_path: Path) -> None:
    """Layer 1 never wants 2. It is evicted for 1; then it comes again and evicts 0, which would have been a hit."""
    trace = layered([[0], [0]], [[0], [1]], [[0], [0]])
    outcome = foresee(trace, "lru", 2, prefetch=always_two(tmp_path), pace=Pace(3, 1))
    assert outcome.hit[..., 0].tolist() == [[False, False], [True, False], [True, False]]
    assert replay(trace, "lru", 2).hit[..., 0].tolist() == [[False, False], [True, False], [True, True]]
    assert (outcome.fetched, outcome.wasted) == (2, 1)
    figures = outcome.figures()
    assert (figures["precision"], figures["coverage"], figures["timely"]) == (0, 0, None)
    assert (figures["wasted_per_token"], figures["pollution_per_token"]) == (1 / 3, 1 / 3)
    # A miss waits for what was sent for before it: token 0 for 3, then at 4 until 6 and 3 more.
    assert outcome.stall_s.tolist() == [8, 3, 5]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("policy", ["lru", "crf:h=16", "slru", "crf+tinylfu", "belady", "belady-bypass"])
def test_without_a_predictor_it_is_the_replay(policy: str, scope: str) -> None:
    ids = Trace.load(DATA / "demo_trace.npz").experts[:25].copy()
    ids[::5, ::3, -1] = 255
    trace = Trace(ids, np.array([0, 25]), {"model": "demo", "layers": 30, "experts": 32, "top_k": 10})
    for pace in (None, Pace(1e-3, 1e-4)):
        one, other = foresee(trace, policy, 14, scope, pace=pace), replay(trace, policy, 14, scope)
        assert (one.hit == other.hit).all()
        assert (one.uploaded == other.uploaded).all()
        assert one.misses == other.misses
        assert one.stall_s.sum() == pytest.approx(one.uploaded.sum() * pace.upload_s if pace else 0)
        assert one.figures()["coverage"] is None


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pace", [Pace(), Pace(1, 1e-3), Pace(1e-3, 1)], ids=["at once", "slow link", "fast link"])
@pytest.mark.parametrize("prefetch", ["oracle:d=4,n=8", "oracle:n=3", "shuffled:oracle:d=2,n=8", "markov:p=0,n=4"])
def test_an_event_never_lacks_slots(prefetch: str, pace: Pace, scope: str) -> None:
    trace = synthetic(60, 5, 12, 3, seed=3, sequences=4)
    for slots in (3, 4, 7, 12):
        outcome = foresee(trace, "lru", slots, scope, prefetch, pace)
        assert not (outcome.hit & outcome.late).any()
        assert outcome.routed == outcome.hits + outcome.misses + outcome.late.sum()
        assert outcome.fetched or slots in (3, 12)  # no room, or nothing absent
        if prefetch == "oracle:n=3" and pace == Pace() and slots == 7:
            assert outcome.hit[:, 1:].all()  # what is sent for at once, of all that is asked for next


def test_what_it_costs_is_what_it_saves() -> None:
    """An oracle's copies replace misses; the link carries as much, earlier."""
    trace = synthetic(200, 4, 32, 4, seed=7)
    for pace in (Pace(1, 0.5), Pace(1, 10)):
        plain, oracle = (foresee(trace, "lru", 8, prefetch=spec, pace=pace) for spec in ("none", "oracle"))
        assert oracle.stall_s.sum() < plain.stall_s.sum()
        assert oracle.figures()["precision"] == 1


@pytest.mark.parametrize(
    ("spec", "scope", "found"),
    [
        ("markov:p=0.1", "layer", (2968, 50, 163, 112)),
        ("markov:p=0.1", "global", (3406, 29, 188, 159)),
        ("nearest", "layer", (2965, 37, 109, 71)),
        ("oracle:d=2,n=3", "layer", (1502, 1467, 1467, 0)),
        ("oracle:d=2,n=3", "global", (1794, 1635, 1635, 0)),
        ("previous", "global", (3088, 407, 1690, 1282)),
        ("shuffled:markov:p=0.1", "layer", (2975, 83, 347, 263)),
    ],
)
def test_golden_prefetching(spec: str, scope: str, found: tuple[int, ...]) -> None:
    """They say "changed", never "wrong"."""
    outcome = foresee(Trace.load(DATA / "small_trace.npz"), "crf:h=16", 8, scope, spec)
    assert (outcome.misses, outcome.covered.sum(), outcome.fetched, outcome.wasted) == found


def test_controls_under_lru() -> None:
    """The token before is resident already; shuffled guesses are right less often than those they were made of."""
    trace = synthetic(300, 4, 32, 4, seed=7)
    by = {spec: figures(foresee(trace, "lru", 8, prefetch=spec)) for spec in ("previous", "oracle", "shuffled:oracle")}
    assert by["previous"]["coverage"] is None  # nothing was fetched
    assert by["shuffled:oracle"]["precision"] < 0.6 < by["oracle"]["precision"] == 1
    assert by["shuffled:oracle"]["coverage"] < by["oracle"]["coverage"]


def figures(outcome: Foresight) -> dict[str, Any]:
    return outcome.figures()


def test_previous_says_what_the_token_before_asked_for() -> None:
    trace = layered([[0, 1], [1, 2]], [[0, 1], [2, 0]], [[0, 1], [0, PAD]], [[0, 1], [1, 2]], starts=(0, 2))
    assert told(trace, "previous") == [[[]], [[1, 2]], [[]], [[0]]]


def test_oracle_says_what_comes() -> None:
    trace = layered([[0], [1], [2]], [[1], [2], [0]])
    assert told(trace, "oracle") == [[[1], [2]], [[2], [0]]]
    assert told(trace, "oracle:d=2") == [[[2]], [[0]]]


def test_markov_counts_who_follows_whom() -> None:
    """After 0 came 2 twice and 1 once, after 1 came 0."""
    trace = layered([[0], [2]], [[0], [1]], [[0], [2]], [[1], [0]], [[0], [1]], [[1], [0]])
    assert told(trace, "markov:p=0.01") == [[[]], [[2]], [[1]], [[]], [[2]], [[0]]]
    assert told(trace, "markov:p=0.6") == [[[]], [[2]], [[]], [[]], [[2]], [[0]]]
    predictor = make_predictor("markov", trace)
    assert predictor is not None
    for token in range(4):
        for layer in (0, 1):
            predictor.seen(token, layer, trace.experts[token, layer].astype(np.int64))
    predictor.seen(4, 0, np.array([0, 1]))
    predictor.k = 3
    experts, likely = predictor.predict(4, 1)
    assert experts.tolist() == [0, 2, 1]
    assert likely == pytest.approx([1 / 2, 1 / 3, 1 / 6])


def test_nearest_follows_the_request_most_like_this_one() -> None:
    """Two requests, then one that begins as the first did."""
    trace = layered([[0], [1]], [[0], [1]], [[2], [0]], [[2], [0]], [[0], [1]], [[0], [1]], starts=(0, 2, 4))
    said = told(trace, "nearest")
    assert said[:2] == [[[]], [[]]]  # nothing to go by
    assert said[2:4] == [[[1]], [[1]]]  # one request is known
    assert said[4] == [[0]]  # nothing is known of this one: as the last
    assert said[5] == [[1]]


def test_gate_asks_the_next_layers_router() -> None:
    trace = seeing(synthetic(30, 4, 12, 3, seed=1))
    assert trace.gates is not None
    assert trace.states is not None
    for ahead in (1, 2):
        predictor = make_predictor(f"gate:d={ahead},p=0", trace)
        assert predictor is not None
        for token, layer in ((0, ahead), (17, 3)):
            logits = trace.gates[layer].astype(np.float64) @ trace.states[token, layer - ahead].astype(np.float64)
            experts, likely = predictor.predict(token, layer)
            assert experts.tolist() == np.argsort(-logits)[:3].tolist()
            assert likely == pytest.approx((np.exp(logits) / np.exp(logits).sum())[experts], rel=1e-4)
    by = {spec: foresee(trace, "lru", 6, prefetch=spec).figures() for spec in ("gate:n=3", "shuffled:gate:n=3")}
    assert by["gate:n=3"]["precision"] > 2 * by["shuffled:gate:n=3"]["precision"]  # type: ignore[operator]


def test_gate_needs_the_routers() -> None:
    trace = replace(seeing(synthetic(4, 2, 8, 2)), gates=None)
    with pytest.raises(ValueError, match="needs the routers and the trace has none: record it with --states"):
        make_predictor("gate", trace)


def fitted(path: Path, trace: Trace, ahead: int = 1, **changed: Any) -> str:
    """A map file that says what the gate would."""
    assert trace.gates is not None
    weights = trace.gates.transpose(0, 2, 1)
    arrays = {"weights": weights, "bias": np.zeros(weights.shape[::2], np.float32), "ahead": ahead, "meta": "{}"}
    np.savez(path, **(arrays | changed))
    return str(path)


def test_a_learned_map_is_read_from_its_file(tmp_path: Path) -> None:
    trace = seeing(synthetic(30, 4, 12, 3, seed=1))
    path = fitted(tmp_path / "map.npz", trace, ahead=2)
    assert told(trace, f"linear:map={path},p=0.1") == told(trace, "gate:d=2,p=0.1")
    bias = np.zeros((4, 12), np.float32)
    bias[:, 5] = 100
    path = fitted(tmp_path / "map.npz", trace, bias=bias)
    assert told(trace, f"linear:map={path}") == [[[5]] * 3] * 30


def test_a_wrong_map_is_one_line(tmp_path: Path) -> None:
    trace = seeing(synthetic(30, 4, 12, 3, seed=1))
    (tmp_path / "no.npz").write_text("no")
    other = seeing(synthetic(30, 4, 16, 3, seed=1))
    for path, words in (
        (str(tmp_path / "nowhere.npz"), "nowhere.npz is no map: [Errno 2] No such file"),
        (str(tmp_path / "no.npz"), "no.npz is no map: "),
        (str(DATA / "small_trace.npz"), "small_trace.npz is no map: "),
        (fitted(tmp_path / "a.npz", trace, ahead=5), "a.npz is no map: weights [4, 8, 12], bias [4, 12], ahead 5"),
        (fitted(tmp_path / "b.npz", trace, bias=np.zeros(3)), "bias [3]"),
        (fitted(tmp_path / "c.npz", trace, bias=np.full((4, 12), np.nan)), "holds NaN"),
        (fitted(tmp_path / "d.npz", other), "maps [4, 8, 16] and the trace is of [4, 8, 12]: fit it to this model"),
    ):
        with pytest.raises(ValueError) as caught:
            make_predictor(f"linear:map={path}", trace)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_shuffled_says_what_was_said_before_and_never_what_is_said_now() -> None:
    trace = of([[0]], 2)

    class Counting(Predictor):
        def predict(self, token: int, layer: int) -> Any:
            return np.array([token]), np.array([0.5])

    from offmoe.cache.predictors.shuffled import KEPT, Shuffled

    predictor = Shuffled(Counting(trace, "counting"), "shuffled:counting")
    said = [predictor.wanted(token, 3).tolist() for token in range(KEPT + 200)]
    assert said[0] == []
    assert all(0 <= token - one[0] <= KEPT and one[0] < token for token, one in enumerate(said) if one)
    assert len({token - one[0] for token, one in enumerate(said) if one}) > 100


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("markov", "markov:d=1,p=0.05,n=2"),
        ("markov:n=3,d=2", "markov:d=2,p=0.05,n=3"),
        ("gate:p=0", "gate:d=1,p=0,n=2"),
        ("oracle:p=1", "oracle:d=1,p=1,n=2"),
        ("shuffled:gate:d=4", "shuffled:gate:d=4,p=0.05,n=2"),
    ],
)
def test_specs_have_one_canonical_name(spec: str, name: str) -> None:
    predictor = make_predictor(spec, seeing(synthetic(4, 5, 8, 2)))
    assert predictor is not None
    assert predictor.name == name


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "prefetch '' is unknown: choose none, previous:d=1…4,p=0…1,n=1…64, markov:"),
        ("gates", "is unknown: choose none"),
        ("markov:", "has no parameter '': write markov:d=1…4,p=0…1,n=1…64"),
        ("markov:x=1", "has no parameter 'x'"),
        ("markov:n=1,n=2", "sets a parameter twice"),
        ("markov:d=0", "d is '0'"),
        ("markov:d=1.5", "d is '1.5'"),
        ("markov:p=1.01", "p is '1.01'"),
        ("markov:p=nan", "p is 'nan'"),
        ("markov:n=65", "n is '65'"),
        ("shuffled", "shuffles nothing: write for example shuffled:gate:d=1,n=2"),
        ("shuffled:none", "shuffles nothing"),
        ("shuffled:fog", "prefetch 'fog' is unknown"),
        ("gate", "'gate:d=1,p=0.05,n=2' needs the hidden states and the trace has none: record it with --states"),
        ("linear", "needs a map: write linear:map=FILE.npz"),
        ("linear:map=", "map is ''"),
    ],
)
def test_a_wrong_predictor_is_one_line(spec: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_predictor(spec, synthetic(4, 2, 8, 2))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_predictor_answers_in_the_shape_that_it_owes() -> None:
    trace = seeing(synthetic(40, 4, 12, 3, seed=2, sequences=4))
    for name in set(PREDICTORS) - {"linear"}:
        predictor = make_predictor(name, trace)
        assert predictor is not None
        for token, layers in enumerate(trace.experts.astype(np.int64)):
            for layer, asked in enumerate(layers):
                predictor.seen(token, layer, asked)
                if layer < 3:
                    experts, likely = predictor.predict(token, layer + 1)
                    assert len(experts) == len(likely) <= 3
                    assert len(set(experts.tolist())) == len(experts)
                    assert ((likely >= 0) & (likely <= 1 + 1e-6)).all()
                    assert (np.diff(likely) <= 0).all()
