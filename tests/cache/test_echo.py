"""Echo by hand: whom it takes for alike, what follows from that, and that it is CRF while there is nothing to hear."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED
from policy_contract import OnlineContract
from synthetic_traces import of, synthetic

from offmoe.cache.policies.echo import AHEAD, NEAREST, Echo, weights
from offmoe.cache.policy import make_policy
from offmoe.cache.replay import replay
from offmoe.cache.trace import Trace

GPT_OSS = SHARED / "traces/gpt-oss-20b.npz"


class TestEcho(OnlineContract):
    spec = "echo:h=4,w=16"


def told(tokens: list[list[int]], records: int = 40, w: int = 16) -> Echo:
    """An echo that has seen these tokens, and what the next one's first use makes it foretell."""
    echo = Echo(records, h=4, w=w)
    for now, used in enumerate(tokens):
        echo.touch(np.array(used), now)
    return echo


def test_what_followed_the_most_similar_token_is_foretold() -> None:
    """The last row is nearest to the first, then to those that share nothing, the younger before."""
    echo = told([[0, 1, 2], [10], [11], [12], [0, 1, 3]])
    assert echo.nearest().tolist() == [4, 2, 3]
    echo.touch(np.array([39]), 5)
    foretold = dict(enumerate(echo.foretold.tolist()))
    assert foretold[10] == 0  # the very next token: a record requested then cannot be evicted anyway
    assert foretold[11] == 8
    assert foretold[12] == 6 + 10922 / 4096  # three after the first row, two after the row of 10
    assert foretold[3] == 4.5 + 4 + 2
    assert sum(value > 0 for value in foretold.values()) == 5


def test_distances_count_both_ways_and_ties_go_to_the_youngest() -> None:
    """A row that used everything, as a prompt's chunk does, shares most and is far all the same."""
    last = [0, 1, 2, 3]
    echo = told([last, [*range(40)], [0, 1, 2, 9], [0, 1, 3, 8], [20, 21, 22, 23], [5], last])
    assert echo.nearest().tolist() == [6, 3, 4, 2, 5]  # 0, 2, 2, 8 and 36 bits differ


@pytest.mark.parametrize("w", [16, 19])
def test_a_ring_remembers_the_last_w_tokens(w: int) -> None:
    """The same said without a ring: all rows kept, the last w looked at."""
    trace = synthetic(90, layers=2, experts=20, k=3, seed=6)
    echo, past = Echo(40, h=4, w=w), np.zeros((0, 40), np.int64)
    for now, ids in enumerate(trace.experts.astype(np.int64)):
        used = np.concatenate([ids[0], ids[1] + 20])
        echo.touch(used, now)
        assert (echo.foretold == slowly(past, w)).all(), now
        past = np.vstack([past, np.zeros(40, np.int64)])
        past[now, used] = 1
    assert echo.foretold.any()


def slowly(past: np.ndarray, w: int) -> np.ndarray:
    """Foretold from rows [tokens, records], every sum in whole units."""
    end = len(past) - 1
    oldest = max(0, end - w + 1)
    alike = sorted(range(oldest, end - 1), key=lambda row: ((past[row] != past[end]).sum(), -row))[:NEAREST]
    said = np.zeros(past.shape[1], np.int64)
    for rank, row in enumerate(alike):
        for i in range(AHEAD):
            if row + 2 + i <= end:
                said += int(2**15 / (rank + 1) * 0.75**i) * past[row + 2 + i]
    return (said / 2**12).astype(np.float32)


def test_layers_of_one_token_share_what_was_foretold() -> None:
    """Nothing of the token itself is used: it may be asked for layer by layer, or all at once."""
    echo = told([[0, 20], [1, 21], [2, 22], [3, 23], [0, 20]])
    before = [echo.foretold.copy() for record in ([4], [24], [25]) if echo.touch(np.array(record), 5) is None]
    assert before[0].any()
    assert (before[0] == before[1]).all()
    assert (before[0] == before[2]).all()


def test_it_is_crf_until_something_is_alike() -> None:
    """Two tokens have no third that came two after one of them."""
    crf, echo = make_policy("crf:h=16", 9), make_policy("echo", 9)
    for now in range(3):
        for policy in (crf, echo):
            policy.touch(np.array([now, now + 5]), now)
        assert (crf.score(np.arange(9), now) == echo.score(np.arange(9), now)).all()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 5))
def test_the_faded_uses_are_crfs_own(waits: list[int], most: int) -> None:
    """What is foretold is added to the score and never kept in the value."""
    crf, echo = make_policy("crf:h=4", 3), make_policy("echo:h=4,w=16", 3)
    for now in np.cumsum(waits).tolist():
        for policy in (crf, echo):
            policy.touch(np.array([now % 3]), now, most)
    assert isinstance(echo, Echo)
    assert (crf.value == echo.value).all()  # type: ignore[attr-defined]


def test_sums_are_exact_in_any_order() -> None:
    assert weights().sum() < 2**24
    assert (weights() > 0).all()
    assert (weights()[:, 0] == [32768, 16384, 10922, 8192, 6553, 5461, 4681, 4096]).all()


def test_a_tune_that_comes_again_is_known() -> None:
    """12 records in turn through 6 slots: recency and frequency hit nothing, the second time round it is heard."""
    trace = of([[i, (i + 1) % 12] for _ in range(20) for i in range(0, 12, 2)], 12)
    assert replay(trace, "crf:h=16", 6).hit_rate == 0
    assert replay(trace, "echo", 6).hit_rate > 0.85 * replay(trace, "belady", 6).hit_rate > 0.3


@pytest.mark.skipif(not GPT_OSS.exists(), reason="../shared/traces/gpt-oss-20b.npz is not here")
def test_gpt_oss_held_out() -> None:
    """The second half of the sequences at 8 of 32 slots: LRU 65.0, CRF 69.0, Belady 77.2 %."""
    trace = Trace.load(GPT_OSS)
    half = int(trace.offsets[len(trace.offsets) // 2 - 1])
    rates = {policy: replay(trace, policy, 8).between(half).hit_rate for policy in ("crf:h=16", "echo")}
    assert rates["crf:h=16"] == pytest.approx(0.690, abs=0.002)
    assert rates["echo"] == pytest.approx(0.719, abs=0.002)
