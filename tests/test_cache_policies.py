"""Every policy keeps the contract; what each computes, by hand; how a person writes one."""

from collections.abc import Iterator

import numpy as np
import pytest
from contract import OnlineContract, PolicyContract, events, pool, take
from hypothesis import given
from hypothesis import strategies as st

from offmoe.cache.policies import OFFLINE, POLICIES
from offmoe.cache.policies.crf import CRF, decay_table
from offmoe.cache.policies.lfru import LFRU
from offmoe.cache.policies.lru import LRU
from offmoe.cache.policy import make_policy


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


class TestBeladyBypass(PolicyContract):
    spec = "belady-bypass"

    def test_victims_have_the_lowest_score_and_then_slot(self) -> None:
        """With bypass: of what was there and what was asked for, the highest scores stay."""
        for scope in ("layer", "global"):
            table, trace = self.table(scope)
            for now, layer, asked in events(trace):
                slots = list(pool(table, layer))
                known = {*table.owner[slots].tolist(), *(asked + layer * table.experts).tolist()} - {-1}
                take(table, layer, asked, now)
                table.check()
                kept = table.owner[slots][table.owner[slots] >= 0]
                best = np.sort(table.policy.score(np.array([*known]), now))[-table.capacity :]
                assert (np.sort(table.policy.score(kept, now)) == best).all()


def test_every_policy_has_its_contract_test() -> None:
    tested = {cls.spec.partition(":")[0] for cls in heirs(PolicyContract) if hasattr(cls, "spec")}
    assert tested == {*POLICIES, *OFFLINE}


def heirs(cls: type[PolicyContract]) -> Iterator[type[PolicyContract]]:
    for child in cls.__subclasses__():
        yield child
        yield from heirs(child)


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


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("lru", "lru"),
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
        ("belady", "policy 'belady' is unknown"),
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
