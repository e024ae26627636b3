"""Every policy keeps the contract; what each computes, by hand; how a person writes one."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_contract import BypassContract, OnlineContract, PolicyContract, take
from synthetic_traces import of

from offmoe.cache.policies import POLICIES, REPLAY_ONLY
from offmoe.cache.policies.crf import CRF, decay_table
from offmoe.cache.policies.lfru import LFRU
from offmoe.cache.policies.lru import LRU
from offmoe.cache.policy import make_policy
from offmoe.cache.replay import replay
from offmoe.cache.residency import Residency


class TestLRU(OnlineContract):
    spec = "lru"


class TestLFU(OnlineContract):
    spec = "lfu"


class TestLFRU(OnlineContract):
    spec = "lfru"


class TestCRF(OnlineContract):
    spec = "crf:h=4"


class TestBelady(PolicyContract):
    spec = "belady"


class TestBeladyBypass(BypassContract):
    spec = "belady-bypass"


class TestLeastStale(OnlineContract):
    spec = "least-stale"


class TestRandom(OnlineContract):
    spec = "random:seed=5"


class TestSLRU(PolicyContract):
    """Not the online contract: what is evicted comes back on probation."""

    spec = "slru:p=50"


class TestStaticLRU(OnlineContract):
    spec = "static+lru:pin=40"


class TestStatic(BypassContract):
    spec = "static"


class TestNoCache(BypassContract):
    spec = "none"


class TestTinyLFU(BypassContract, OnlineContract):
    spec = "crf+tinylfu:h=4"


def test_every_policy_has_its_contract_test() -> None:
    """Here or in a file of its own."""
    texts = [path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    tested = {name for text in texts for name in re.findall(r'^    spec = "([a-z+-]+)', text, re.MULTILINE)}
    assert tested == {*POLICIES, *REPLAY_ONLY}


def test_lru_orders_the_layers_of_one_token() -> None:
    lru = LRU(6)
    for records in ([4, 5], [0, 1], [2]):
        lru.touch(np.array(records), 9)
    assert np.argsort(lru.score(np.arange(6), 9), kind="stable").tolist() == [3, 4, 5, 0, 1, 2]


def test_lfu_counts_uses() -> None:
    lfu = make_policy("lfu", 3)
    lfu.touch(np.array([0, 1]), 0, np.array([3, 1]))
    lfu.touch(np.array([1]), 900)
    assert lfu.score(np.arange(3), 5000).tolist() == [3, 2, 0]


@given(*[st.integers(0, 2**25 - 1)] * 2, *[st.integers(1, 2**25 - 1)] * 2)
def test_lfru_orders_as_the_integers_do(uses: int, more: int, age: int, longer: int) -> None:
    """Two records' quotients compare as their cross-products, which is how a kernel compares them."""
    lfru = LFRU(2)
    lfru.uses[:] = uses, more
    lfru.last[:] = 2**25 - age, 2**25 - longer
    one, other = lfru.score(np.arange(2), 2**25 - 1)
    left, right = uses * longer, more * age
    assert ((one > other), (one == other)) == ((left > right), (left == right))


def test_lfru_tells_neighbouring_fractions_apart() -> None:
    n = 2**25 - 1
    lfru = LFRU(2)
    lfru.uses[:] = n - 2, n - 1  # (n - 2) / (n - 1) < (n - 1) / n by 2^-50
    lfru.last[:] = 1, 0
    one, other = lfru.score(np.arange(2), n - 1)
    assert one < other


def test_crf_halves_in_a_half_life() -> None:
    crf = CRF(2, h=8)
    crf.touch(np.array([0]), 100)
    assert crf.score(np.array([0, 1]), 108).tolist() == [0.5, 0]
    crf.touch(np.array([0]), 108, 2)
    assert crf.score(np.array([0]), 108 + 16).tolist() == [2.5 / 4]


@given(st.lists(st.integers(0, 500), min_size=1, max_size=30), st.integers(1, 64), st.integers(0, 200))
def test_crf_is_the_sum_of_faded_uses(times: list[int], half_life: int, wait: int) -> None:
    crf = CRF(1, h=half_life)
    now = max(times) + wait
    for time in sorted(times):
        crf.touch(np.array([0]), time)
    exact = sum(2.0 ** (-(now - time) / half_life) for time in times)
    assert crf.score(np.array([0]), now)[0] == pytest.approx(exact, rel=1e-5, abs=1e-17)


@pytest.mark.parametrize("half_life", [1, 64, 4096])
def test_crf_decays_to_a_defined_zero_without_subnormals(half_life: int) -> None:
    table = decay_table(half_life)
    assert table.dtype == np.float32
    assert table[0] == 1
    assert table[half_life] == 0.5
    assert table[-1] == 0
    assert (np.diff(table) < 0).all()
    assert table[-2] > np.finfo(np.float32).tiny  # a GPU may flush what is smaller
    crf = CRF(1, h=half_life)
    crf.touch(np.array([0]), 0)
    ages = [64 * half_life - 1, 64 * half_life, 10**9]
    assert [crf.score(np.array([0]), age)[0] > 0 for age in ages] == [True, False, False]
    assert crf.score(np.array([0]), 5).dtype == np.float32


def test_crf_rounds_the_product_before_the_sum() -> None:
    """The kernel's contract: two float32 roundings, no fused multiply-add."""
    crf = CRF(1, h=3)
    decay = np.float32(2 ** (-1 / 3))
    value = np.float32(0)
    for now in range(200):
        crf.touch(np.array([0]), now)
        value = np.float32(np.float32(value * decay) + np.float32(1))
        assert crf.value[0] == value


def table_of(spec: str, slots: int, scope: str = "layer", layers: int = 1, experts: int = 6) -> Residency:
    return Residency(layers, experts, slots, make_policy(spec, layers * experts), scope)


def held(table: Residency, *asked: int) -> list[int]:
    """Asks for one expert a token; the records that are there afterwards."""
    for expert in asked:
        take(table, 0, np.array([expert]), table.now + 1)
    return sorted(table.owner[table.owner >= 0].tolist())


def test_slru_protects_what_was_hit() -> None:
    table = table_of("slru:p=50", 4)  # two of four
    assert held(table, 0, 1, 2, 3) == [0, 1, 2, 3]
    assert held(table, 0, 1, 4, 5) == [0, 1, 4, 5]  # lru would keep the same
    assert held(table, 2, 3) == [0, 1, 2, 3]  # lru would have lost 0 and 1


def test_slru_sends_the_oldest_of_too_many_back_as_the_most_recent_on_probation() -> None:
    table = table_of("slru:p=50", 4)
    held(table, 0, 1, 2, 3, 0, 1, 2)  # 0 is on probation again, used after 3
    assert np.flatnonzero(table.policy.protected).tolist() == [1, 2]  # type: ignore[attr-defined]
    assert held(table, 4) == [0, 1, 2, 4]
    assert held(table, 5) == [1, 2, 4, 5]


def test_slru_forgets_the_protection_of_what_was_evicted() -> None:
    table = table_of("slru:p=99", 2)  # one of two
    assert held(table, 0, 0, 1, 1) == [0, 1]  # 1 is protected now
    assert held(table, 2) == [1, 2]
    assert held(table, 0) == [0, 1]
    assert table.policy.protected[:3].tolist() == [0, 1, 0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("spec", "hits"), [("lru", []), ("least-stale", [(1, 2), (2, 2), (3, 2)])])
def test_least_stale_keeps_layers_to_come(spec: str, hits: list[tuple[int, int]]) -> None:
    """Three layers, room for two records: lru always evicts what is asked for next."""
    table = table_of(spec, 2, "global", layers=3)
    events = [(now, layer) for now in range(4) for layer in range(3)]
    assert [event for event in events if take(table, event[1], np.array([0]), event[0]).hit[0]] == hits


def test_least_stale_evicts_first_what_this_pass_went_by() -> None:
    table = table_of("least-stale", 3, "global", layers=2)
    take(table, 1, np.array([5]), 0)
    take(table, 0, np.array([0]), 1)
    take(table, 1, np.array([4]), 1)  # full: layer 0 of this pass, both of layer 1, of which 5 was not touched
    assert take(table, 0, np.array([1]), 2).evicted.tolist() == [0]
    assert take(table, 1, np.array([3]), 2).evicted.tolist() == [6 + 5]


def test_random_is_the_same_again_and_spreads_over_all() -> None:
    scores = [
        make_policy(spec, 1000).score(np.arange(1000), 7) for spec in ("random", "random:seed=0", "random:seed=1")
    ]
    assert (scores[0] == scores[1]).all()
    assert (scores[0] != scores[2]).all()
    assert len(np.unique(scores[0])) == 1000
    assert np.corrcoef(scores[0], make_policy("random", 1000).score(np.arange(1000), 8))[0, 1] < 0.1
    victims = [int(make_policy("random", 8).score(np.arange(8), now).argmin()) for now in range(800)]
    assert np.bincount(victims, minlength=8).min() > 60


def test_none_keeps_nothing() -> None:
    trace = of([[0, 1]] * 5, 4)
    outcome = replay(trace, "none", 4)
    assert (outcome.misses, outcome.uploads_per_token) == (10, 0)


def test_static_keeps_the_hottest_of_the_first_half() -> None:
    asked = [0, 1, 1, 2, 2, 3, 0, 3, 1, 2, 3, 3]  # in the first half mostly 1 and 2
    outcome = replay(of([[expert] for expert in asked], 4), "static", 2)
    assert outcome.hit.ravel().tolist() == [e in (1, 2) and at not in (1, 3) for at, e in enumerate(asked)]
    assert outcome.uploads_per_token * 12 == 2


def test_static_lru_keeps_its_share_and_the_rest_recent(tmp_path: Path) -> None:
    profile = tmp_path / "profile.npz"
    of([[5], [5], [4]], 6).save(profile)
    table = table_of(f"static+lru:pin=34,profile={profile}", 3)
    assert table.policy.name == f"static+lru:pin=34,profile={profile}"
    assert held(table, 5, 0, 1, 2, 3) == [2, 3, 5]


def test_tinylfu_lets_in_only_what_is_hotter_than_who_would_leave() -> None:
    trace = of([[0], [0], [1], [1], [2], [2], [2], [1]], 3)
    outcome = replay(trace, "crf+tinylfu:h=4096", 2)
    # one use of 2 against two of 0: stays out; its second use is as many and later: 0 leaves
    assert outcome.hit.ravel().tolist() == [False, True, False, True, False, False, True, True]
    assert outcome.uploaded.ravel().tolist() == [True, False, True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("lru", "lru"),
        ("slru", "slru:p=80"),
        ("lfu", "lfu"),
        ("crf", "crf:h=64"),
        ("crf:h=16", "crf:h=16"),
        ("crf:h=016", "crf:h=16"),
    ],
)
def test_specs_have_one_canonical_name(spec: str, name: str) -> None:
    assert make_policy(spec, 4).name == name


def test_the_half_life_is_the_one_written() -> None:
    policy = make_policy("crf:h=7", 4)
    policy.touch(np.array([0]), 0)
    assert policy.score(np.array([0]), 7)[0] == 0.5


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "policy '' is unknown: choose lru, crf:h=1…4096, lfu"),
        ("fifo", "policy 'fifo' is unknown: choose lru, crf:h=1…4096, lfu"),
        ("belady", "policy 'belady' runs in replay only: choose lru, crf, lfu"),
        ("crf+tinylfu:h=8", "policy 'crf+tinylfu:h=8' runs in replay only"),
        ("static+lru", "policy 'static+lru:pin=50' needs a profile: write static+lru:profile=TRACE.npz"),
        ("static+lru:profile=", "profile is '': write static+lru:pin=1…99,profile=FILE"),
        ("static+lru:profile=nowhere.npz", "nowhere.npz is no routing trace"),
        ("static+lru:profile=tests/data/small_trace.npz", "is of 128 records and 4 are needed"),
        ("LRU", "'LRU' is unknown"),
        ("lru:", "policy 'lru:' has no parameter '': write lru"),
        ("lru:h=3", "policy 'lru:h=3' has no parameter 'h': write lru"),
        ("crf:half=3", "has no parameter 'half': write crf:h=1…4096"),
        ("crf:h", "policy 'crf:h': h is '': write crf:h=1…4096"),
        ("crf:h=0", "h is '0': write crf:h=1…4096"),
        ("crf:h=4097", "h is '4097': write crf:h=1…4096"),
        ("crf:h=-1", "h is '-1'"),
        ("crf:h=1.5", "h is '1.5'"),
        ("crf:h=nan", "h is 'nan'"),
        ("crf:h=٣", "h is '٣'"),
        ("crf:h=" + "9" * 5000, "write crf:h=1…4096"),
        ("crf:h=1,h=2", "policy 'crf:h=1,h=2' sets a parameter twice: write crf:h=1…4096"),
    ],
)
def test_a_wrong_spec_is_one_line_that_says_what_exists(spec: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_policy(spec, 4)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
