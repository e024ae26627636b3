"""Replay: golden counts, the two laws, hand-computed bounds and the published figures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
from exhaustive import where_present
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import DATA, SHARED
from synthetic_traces import of

from offmoe.cache import fast
from offmoe.cache.policies import POLICIES, REPLAY_ONLY
from offmoe.cache.replay import replay
from offmoe.cache.trace import Trace

GPT_OSS = SHARED / "traces/gpt-oss-20b.npz"
SHARED_TRACES = ("gpt-oss-20b", "qwen3-30b-a3b-top6")
FORCED = ("lru", "lfu", "lfru", "crf:h=8")  # these have a compiled twin, the others not
SLOW = [name for name, kind in POLICIES.items() if kind not in fast.KINDS]
BYPASS = [name for name in REPLAY_ONLY if name not in ("belady", "belady-bypass")]
TWINS = ("lru", "lfu", "lfru", "crf:h=8", "crf+tinylfu:h=8", "belady", "belady-bypass")
PAD = 2**16 - 1
load = cache(Trace.load)

# Goldens say "changed", never "wrong": the laws and the slow model say that.
GOLDEN = {
    "demo_trace": {  # bench/demo_trace.py
        ("lru", "layer", 12): 55660,
        ("lru", "global", 16): 53328,
        ("lfu", "layer", 16): 41026,
        ("crf:h=16", "layer", 16): 39646,
        ("crf:h=16", "global", 16): 42734,
        ("crf:h=64", "global", 24): 19672,
        ("lfru", "layer", 16): 40153,
        ("lfru", "global", 16): 48531,
        ("crf+tinylfu:h=64", "layer", 16): 43590,
        ("crf+tinylfu:h=64", "global", 16): 44575,
        ("slru:p=80", "layer", 16): 40457,
        ("least-stale", "layer", 16): 41660,
        ("least-stale", "global", 16): 46360,
        ("static+lru:pin=50", "layer", 16): 40599,
        ("random:seed=0", "layer", 16): 42533,
        ("none", "layer", 16): 109200,
    },
    "small_trace": {
        ("lru", "layer", 8): 3188,
        ("lru", "layer", 16): 1657,
        ("lru", "global", 8): 3215,
        ("lru", "global", 16): 1660,
        ("lfu", "layer", 8): 2933,
        ("lfu", "layer", 16): 1388,
        ("lfu", "global", 8): 3515,
        ("lfu", "global", 16): 1565,
        ("crf:h=16", "layer", 8): 2969,
        ("crf:h=16", "layer", 16): 1477,
        ("crf:h=16", "global", 8): 3418,
        ("crf:h=16", "global", 16): 1480,
        ("crf:h=64", "layer", 8): 2934,
        ("crf:h=64", "layer", 16): 1434,
        ("crf:h=64", "global", 8): 3473,
        ("crf:h=64", "global", 16): 1542,
        ("belady", "layer", 8): 2201,
        ("belady", "layer", 16): 873,
        ("belady", "global", 8): 1916,
        ("belady", "global", 16): 783,
        ("belady-bypass", "layer", 8): 2013,
        ("belady-bypass", "layer", 16): 845,
        ("belady-bypass", "global", 8): 1872,
        ("belady-bypass", "global", 16): 777,
        ("lfru", "layer", 8): 2877,
        ("lfru", "global", 8): 2932,
        ("crf+tinylfu:h=64", "layer", 8): 3467,
        ("crf+tinylfu:h=64", "global", 8): 3452,
        ("slru:p=80", "layer", 8): 3148,
        ("slru:p=80", "global", 8): 3256,
        ("least-stale", "layer", 8): 3188,
        ("least-stale", "global", 8): 4061,
        ("static+lru:pin=50", "layer", 8): 2984,
        ("static+lru:pin=50", "global", 8): 3003,
        ("static", "layer", 8): 3502,
        ("random:seed=0", "layer", 8): 3727,
        ("random:seed=0", "global", 8): 5280,
    },
}


# 4,000 tokens of the demo's chat and text, as `offmoe trace record` wrote them: misses at 12, 16 and 24 of 32 slots.
CHAT = {
    ("lru", "layer"): (567390, 423035, 168613),
    ("lfu", "layer"): (569116, 430511, 189238),
    ("lfru", "layer"): (563648, 414798, 163945),
    ("crf:h=16", "layer"): (539623, 375948, 138168),
    ("crf:h=64", "layer"): (545782, 384983, 149073),
    ("crf+tinylfu:h=64", "layer"): (548560, 397640, 158156),
    ("belady", "layer"): (473537, 271955, 77323),
    ("belady-bypass", "layer"): (329397, 211353, 66288),
    ("lru", "global"): (None, 517152, None),
    ("crf:h=16", "global"): (None, 393093, None),
    ("belady", "global"): (None, 198429, None),
}


@pytest.mark.parametrize(("policy", "scope", "golden"), [(*run, golden) for run, golden in CHAT.items()])
def test_golden_misses_of_the_recorded_chat(policy: str, scope: str, golden: tuple[int | None, ...]) -> None:
    pytest.importorskip("numba")  # or it takes minutes
    for slots, misses in zip((12, 16, 24), golden, strict=True):
        if misses is not None:
            assert replay(load(DATA / "demo_chat_trace.npz"), policy, slots, scope).misses == misses


@pytest.mark.parametrize(
    ("name", "policy", "scope", "slots", "misses"),
    [(name, *run, misses) for name, runs in GOLDEN.items() for run, misses in runs.items()],
)
def test_golden_misses(name: str, policy: str, scope: str, slots: int, misses: int) -> None:
    assert replay(load(DATA / f"{name}.npz"), policy, slots, scope).misses == misses


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", GOLDEN)
def test_the_two_laws_on_committed_traces(name: str, scope: str) -> None:
    trace = load(DATA / f"{name}.npz")
    k, experts = trace.meta["top_k"], trace.meta["experts"]
    before = trace.experts.size
    for slots in sorted({k, k + 1, max(k, experts // 4), experts // 2, experts - 1, experts}):
        bound = replay(trace, "belady", slots, scope).misses
        least = replay(trace, "belady-bypass", slots, scope).misses
        assert least <= bound
        assert replay(trace, "crf+tinylfu:h=8", slots, scope).misses >= least
        misses = {policy: replay(trace, policy, slots, scope).misses for policy in FORCED}
        assert all(count >= bound for count in misses.values()), (slots, misses, bound)
        assert misses["lru"] <= before
        before = misses["lru"]
    used = sum(len(np.unique(trace.experts[:, layer])) for layer in range(trace.meta["layers"]))
    assert before == bound == used


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("slots", [4, 9])
def test_no_policy_without_a_twin_beats_belady_either(scope: str, slots: int) -> None:
    trace = Trace.take(load(DATA / "small_trace.npz"), [0])
    for policies, bound in ((SLOW, "belady"), (BYPASS, "belady-bypass")):
        least = replay(trace, bound, slots, scope).misses
        assert all(replay(trace, policy, slots, scope).misses >= least for policy in policies)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "as Python"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("policy", TWINS)
def test_the_twin_chooses_as_the_table_does(
    policy: str, scope: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hit for hit, on routing of real models, with events of fewer than k experts in between."""
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(fast, "compiled", lambda: fast.run_events)
    trace = cut(load(DATA / "demo_trace.npz"), 120 if compiled else 15)
    for slots in (10, 13, 20):
        one, other = (replay(trace, policy, slots, scope, fast=fast) for fast in (True, False))
        assert (one.hit == other.hit).all()
        assert (one.uploaded == other.uploaded).all()
        assert 0 < one.hits < one.routed


def cut(trace: Trace, tokens: int) -> Trace:
    """The first tokens; every 7th event lacks one or two of its experts."""
    ids = trace.experts[:tokens].copy()
    flat = ids.reshape(-1, ids.shape[-1])
    flat[::7, -1] = flat[::14, -2] = trace.pad
    return Trace(ids, np.array([0, tokens]), trace.meta)


class NoFile:
    """numba, where no file can be written."""

    @staticmethod
    def njit(function: object = None, cache: bool = False) -> object:
        if cache:
            return lambda function: (_ for _ in ()).throw(RuntimeError("cannot cache function"))
        return function


@pytest.mark.parametrize("there", [None, NoFile])
def test_numba_may_be_absent_or_without_a_place_for_its_file(
    there: type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numba", there)
    fast.compiled.cache_clear()
    try:
        assert fast.compiled() is (there and fast.run_events)
        assert replay(of([[0], [1], [0]], 2), "lru", 2).hit.ravel().tolist() == [False, False, True]
    finally:
        fast.compiled.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"),
    where_present(product(SHARED_TRACES, TWINS), GPT_OSS.exists(), f"{GPT_OSS.parent} is absent"),
)
def test_the_twin_chooses_as_the_table_does_on_shared_traces(name: str, policy: str) -> None:
    whole = load(SHARED / "traces" / f"{name}.npz")
    trace = Trace(whole.experts[:1500], np.array([0, len(whole.experts[:1500])]), whole.meta)
    one, other = (replay(trace, policy, 8, fast=fast) for fast in (True, False))
    assert (one.hit == other.hit).all()
    assert (one.uploaded == other.uploaded).all()


def test_events_of_fewer_than_k_count_what_they_ask_for() -> None:
    outcome = replay(of([[0, 1], [1, PAD], [0, PAD]], 4), "lru", 2)
    assert (outcome.routed, outcome.hits) == (4, 2)
    assert outcome.hit_rate == 0.5
    assert outcome.hit_rate_by_layer.tolist() == [0.5]
    assert outcome.between(1).hit_rate == 1
    assert outcome.misses_per_token == 2 / 3


tiny = st.integers(1, 2).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 4), min_size=k, max_size=k, unique=True), min_size=1, max_size=14).map(
        lambda ids: of(ids, 5)
    )
)


@settings(deadline=None)
@given(tiny, st.integers(2, 5))
def test_belady_is_the_least_that_any_choice_can_miss(trace: Trace, slots: int) -> None:
    forced, bypass = (replay(trace, name, slots).misses for name in ("belady", "belady-bypass"))
    assert forced == least_misses(trace, slots, forced=True)
    assert bypass == least_misses(trace, slots, forced=False)
    assert all(replay(trace, policy, slots).misses >= forced for policy in FORCED)


def least_misses(trace: Trace, slots: int, forced: bool) -> int:
    """By trying everything that could be kept after every event."""
    reached = {frozenset[int](): 0}
    for asked in (frozenset(ids) for ids in trace.experts[:, 0].tolist()):
        held = asked if forced else frozenset[int]()
        following: dict[frozenset[int], int] = {}
        for kept, misses in reached.items():
            others = (kept | asked) - held
            for rest in combinations(others, min(len(others), slots - len(held))):
                state = held.union(rest)
                cost = misses + len(asked - kept)
                following[state] = min(cost, following.get(state, cost))
        reached = following
    return min(reached.values())


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=60))
def test_lru_misses_never_grow_with_capacity(ids: list[int]) -> None:
    """A theorem for one id an event; ties between several go by slot, which no capacity shares."""
    trace = of([[expert] for expert in ids], 8)
    misses = [replay(trace, "lru", slots).misses for slots in range(1, 9)]
    assert misses == sorted(misses, reverse=True)


@pytest.mark.parametrize(
    ("policy", "ids", "misses", "uploads"),
    [
        ("lru", [0, 1, 2, 0, 1, 2], 6, 6),
        ("belady", [0, 1, 2, 0, 1, 2], 4, 4),  # 2 replaces 1; 1 replaces 0
        ("belady-bypass", [0, 1, 2, 0, 1, 2], 4, 2),  # 2 bypasses twice
        ("lfu", [0, 0, 1, 2, 0, 1, 2], 5, 5),
        ("crf:h=1", [0, 0, 0, 1, 2, 0], 4, 4),  # at 2: record 0 scores 1.75/4, record 1 1/2
        ("crf:h=4", [0, 0, 0, 1, 2, 0], 3, 3),
    ],
)
def test_by_hand(policy: str, ids: list[int], misses: int, uploads: int) -> None:
    outcome = replay(of([[expert] for expert in ids], 3), policy, 2)
    assert (outcome.misses, round(outcome.uploads_per_token * len(ids))) == (misses, uploads)


def test_the_figures_are_those_of_the_events() -> None:
    trace = Trace(
        np.array([[[0], [1]], [[0], [2]], [[1], [1]], [[0], [1]]], np.uint8),
        np.array([0, 4]),
        {"model": "hand", "layers": 2, "experts": 3, "top_k": 1},
    )
    outcome = replay(trace, "lru", 1)
    assert outcome.hit[..., 0].tolist() == [[False, False], [True, False], [False, False], [False, True]]
    assert outcome.hit_rate == 2 / 8
    assert outcome.hit_rate_by_layer.tolist() == [1 / 4, 1 / 4]
    assert (outcome.misses, outcome.misses_per_token, outcome.uploads_per_token) == (6, 1.5, 1.5)
    assert (outcome.policy, outcome.scope, outcome.slots) == ("lru", "layer", 1)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda t: replay(t, "fifo", 2), "policy 'fifo' is unknown"),
        (lambda t: replay(t, "lru", 2, "pool"), "scope 'pool' is unknown: choose layer or global"),
        (lambda t: replay(t, "lru", 1, "global"), "1 slots a layer are too few: every token needs 2"),
        (lambda t: replay(t, "lru", 1), "1 slots a layer are too few: every token needs 2"),
    ],
)
def test_a_wrong_request_is_one_line(run: Callable[[Trace], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(of([[0, 1]], 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "figures"),
    where_present(
        [
            ("lru", {4: 43.7, 8: 64.8, 16: 90.0}),
            ("crf:h=16", {8: 69.2, 16: 91.7}),
            ("lfu", {8: 63.5, 16: 86.8}),
            ("belady", {4: 43.7, 8: 77.2, 16: 95.1}),
            ("belady-bypass", {4: 60.8, 8: 80.9, 16: 95.6}),
        ],
        GPT_OSS.exists(),
        f"{GPT_OSS} is absent",
    ),
)
def test_the_published_figures_of_gpt_oss(policy: str, figures: dict[int, float]) -> None:
    """Published for five times the tokens. LFU swings by 10 points over this part of them: 1.1 off at 8."""
    for slots, figure in figures.items():
        found = 100 * replay(load(GPT_OSS), policy, slots).hit_rate
        assert found == pytest.approx(figure, abs=1.1 if policy == "lfu" else 1), f"{policy} at {slots} slots"
