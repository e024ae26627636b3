"""The table against a slow model of its rules, what it refuses, and what check() says."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmoe.cache.policies.base import Policy
from offmoe.cache.policy import make_policy
from offmoe.cache.residency import Access, Residency, lowest

LAYERS, EXPERTS, MOST = 3, 6, 3
SPECS = st.sampled_from(["lru", "lfu", "lfru", "crf:h=2"])


class Model:
    """The rules of Residency, one record at a time, on a dictionary."""

    def __init__(self, slots: int, policy: Policy, scope: str) -> None:
        each = slots // LAYERS
        self.pools = [range(p * each, (p + 1) * each) if scope == "layer" else range(slots) for p in range(LAYERS)]
        self.held: dict[int, int] = {}  # slot: record
        self.arriving: set[int] = set()
        self.policy = policy

        self.guarded: dict[int, set[int]] = {}  # layer: slots
        self.leaving: set[int] = set()
        self.fresh: set[int] = set()  # slots that were prefetched and not used yet
        self.wasted = 0

    def order(self, layer: int, keep: set[int], now: int) -> list[int]:
        """The slots that may go, first to last."""
        kept = keep | self.arriving | self.leaving | set().union(*self.guarded.values())
        pool = [slot for slot in self.pools[layer] if slot not in kept]
        going = [slot for slot in pool if slot in self.held]
        going.sort(key=lambda slot: (self.policy.score(np.array([self.held[slot]]), now)[0], slot))
        return [slot for slot in pool if slot not in self.held] + going

    def prefetch(self, layer: int, experts: list[int], now: int, most: int, held: set[int]) -> list[tuple[int, int]]:
        """The records admitted and their slots."""
        named = [layer * EXPERTS + expert for expert in experts]
        present = {slot for slot, record in self.held.items() if record in named}
        takes = self.order(layer, present | held, now)
        absent = [record for record in named if record not in self.held.values()]
        pairs = list(zip(absent[:most], takes, strict=False))
        for record, slot in pairs:
            self.wasted += slot in self.fresh
            self.held[slot] = record
        self.guarded[layer] = {slot for _, slot in pairs}
        self.fresh |= self.guarded[layer]
        self.arriving |= self.guarded[layer]
        return pairs

    def access(self, layer: int, experts: list[int], now: int, uses: list[int]) -> list[tuple[str, int]]:
        """Return for each requested record: hit, late or miss, and its slot."""
        asked = [layer * EXPERTS + expert for expert in experts]
        slot_of = {record: slot for slot, record in self.held.items()}
        kinds = ["miss" if r not in slot_of else "late" if slot_of[r] in self.arriving else "hit" for r in asked]
        self.policy.touch(np.array(asked), now, np.array(uses))
        self.leaving = set()
        used = {slot for slot, record in self.held.items() if record in asked}
        takes = self.order(layer, used, now)
        for record in sorted(r for r, kind in zip(asked, kinds, strict=True) if kind == "miss"):
            slot = takes.pop(0)
            self.wasted += slot in self.fresh
            self.fresh.discard(slot)
            self.held[slot], slot_of[record] = record, slot
            self.arriving.add(slot)
        kinds = ["covered" if k == "hit" and slot_of[r] in self.fresh else k for r, k in zip(asked, kinds, strict=True)]
        self.fresh -= used
        self.leaving = self.guarded.pop(layer, set())
        return [(kind, slot_of[record]) for record, kind in zip(asked, kinds, strict=True)]


@st.composite
def asked(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    experts = draw(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=MOST, unique=True))
    uses = draw(st.lists(st.integers(1, 9), min_size=len(experts), max_size=len(experts)))
    return draw(st.integers(0, LAYERS - 1)), experts, uses


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(asked(), st.integers(0, 2), st.sets(st.integers(0, 19))), min_size=5, max_size=60),
    slots=st.integers(9, 20),
    scope=st.sampled_from(["layer", "global"]),
    spec=SPECS,
)
def test_the_table_does_what_its_rules_say(
    steps: list[tuple[tuple[int, list[int], list[int]], int, set[int]]], slots: int, scope: str, spec: str
) -> None:
    table = Residency(LAYERS, EXPERTS, slots, make_policy(spec, LAYERS * EXPERTS), scope)
    model = Model(slots, make_policy(spec, LAYERS * EXPERTS), scope)
    now = 0
    for (layer, experts, uses), wait, failing in steps:
        now += wait
        if table.arriving.sum() > table.capacity - MOST:  # room for whatever is asked next
            settle(table, model, failing)
        before = set(model.held.values())
        access = table.access(layer, np.array(experts), now, np.array(uses))
        expected = model.access(layer, experts, now, uses)
        assert kinds(access) == expected
        assert set(access.evicted.tolist()) == before - set(model.held.values())
        table.check()
        assert {s: r for s, r in enumerate(table.owner.tolist()) if r >= 0} == model.held
        assert set(np.flatnonzero(table.arriving).tolist()) == model.arriving


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(asked(), asked(), st.integers(0, 2), st.integers(0, 1)), min_size=5, max_size=60),
    slots=st.integers(15, 20),
    scope=st.sampled_from(["layer", "global"]),
    spec=SPECS,
)
def test_prefetching_does_what_its_rules_say(
    steps: list[tuple[tuple[int, list[int], list[int]], tuple[int, list[int], list[int]], int, int]],
    slots: int, scope: str, spec: str,
) -> None:  # fmt: skip
    """An event, then a prediction of at most 2 for some layer that has none, which may be there before its event."""
    table = Residency(LAYERS, EXPERTS, slots, make_policy(spec, LAYERS * EXPERTS), scope)
    model = Model(slots, make_policy(spec, LAYERS * EXPERTS), scope)
    for now, ((layer, experts, uses), (other, predicted, _), most, lands) in enumerate(steps):
        access = table.access(layer, np.array(experts), now, np.array(uses))
        assert kinds(access) == model.access(layer, experts, now, uses)
        settle(table, model, set())
        if other not in table.guarded:
            records, taken = table.prefetch(other, np.array(predicted), now, most, access.slots)
            expected = model.prefetch(other, predicted, now, most, {*access.slots.tolist()})
            assert list(zip(records.tolist(), taken.tolist(), strict=True)) == expected
            if lands:
                settle(table, model, set())
        table.check()
        assert {s: r for s, r in enumerate(table.owner.tolist()) if r >= 0} == model.held
        assert set(np.flatnonzero(table.prefetched).tolist()) == model.fresh
        assert table.wasted == model.wasted


def kinds(access: Access) -> list[tuple[str, int]]:
    flags = zip(access.hit, access.late, access.covered, strict=True)
    words = ["covered" if covered else "hit" if hit else "late" if late else "miss" for hit, late, covered in flags]
    return list(zip(words, access.slots.tolist(), strict=True))


def settle(table: Residency, model: Model, failing: set[int]) -> None:
    """Everything arriving lands, but for the slots whose read fails."""
    failed = model.arriving & failing
    table.landed(np.array([*model.arriving - failed], np.int64))
    table.abandon(np.array([*failed], np.int64))
    model.arriving.clear()
    for slot in failed:
        del model.held[slot]


def table(slots: int = 4, scope: str = "global") -> Residency:
    return Residency(2, 4, slots, make_policy("lru", 8), scope)


def test_asked_for_again_on_its_way_is_late_and_then_a_hit() -> None:
    cache = table()
    first = cache.access(0, np.array([1, 2]), 0)
    assert kinds(first) == [("miss", 0), ("miss", 1)]
    assert kinds(cache.access(0, np.array([2, 3]), 1)) == [("late", 1), ("miss", 2)]
    cache.landed(first.slots)
    assert kinds(cache.access(0, np.array([3, 2]), 2)) == [("late", 2), ("hit", 1)]


def test_prefetched_is_covered_once_late_where_it_has_not_landed_and_wasted_where_it_leaves_unused() -> None:
    cache = table()
    records, slots = cache.prefetch(0, np.array([3, 1, 2]), 0, 2)
    assert (records.tolist(), slots.tolist()) == ([3, 1], [0, 1])
    cache.landed(slots[:1])
    assert kinds(cache.access(0, np.array([1, 3]), 0)) == [("late", 1), ("covered", 0)]
    cache.landed(slots[1:])
    assert kinds(cache.access(0, np.array([1, 3]), 1)) == [("hit", 1), ("hit", 0)]
    cache.landed(cache.prefetch(1, np.array([0, 1]), 1, 2)[1])
    cache.landed(cache.access(1, np.array([0]), 1).slots[:0])
    assert cache.wasted == 0
    cache.access(0, np.array([0, 1, 2, 3]), 2)
    assert cache.wasted == 1


def test_what_is_prefetched_stays_for_its_event_and_for_the_prediction_after_it() -> None:
    """The prediction takes from the same list as the event, on which those slots were not."""
    cache = table()
    cache.landed(cache.prefetch(0, np.array([0, 1]), 0, 2)[1])
    for asked in ([0, 1], [2, 3]):  # although what nobody has used yet scores lower
        access = cache.access(1, np.array(asked), 0)
        assert access.slots.tolist() == [2, 3]
        cache.landed(access.slots)
    assert kinds(cache.access(0, np.array([0]), 0)) == [("covered", 0)]
    slots = cache.prefetch(1, np.array([0, 1]), 0, 2)[1]
    assert slots.tolist() == [2, 3]
    cache.landed(slots)
    assert kinds(cache.access(1, np.array([0, 1, 2]), 1)) == [("covered", 2), ("covered", 3), ("miss", 1)]
    assert cache.wasted == 1


def test_prefetching_takes_what_room_there_is() -> None:
    cache = table()
    held = cache.access(0, np.array([0, 1, 2]), 0).slots
    cache.landed(held)
    assert cache.prefetch(1, np.array([0, 1]), 0, 2, held)[1].tolist() == [3]
    assert cache.prefetch(0, np.array([0, 1, 2]), 0, 2)[1].tolist() == []


def test_an_abandoned_slot_is_free_and_its_record_absent() -> None:
    cache = table()
    cache.landed(cache.access(0, np.array([0]), 0).slots)
    cache.abandon(cache.access(0, np.array([1, 2]), 1).slots[:1])
    cache.check()
    assert cache.owner.tolist() == [0, -1, 2, -1]
    assert kinds(cache.access(0, np.array([1]), 2)) == [("miss", 1)]


def test_layer_scope_leaves_the_remainder_out() -> None:
    cache = table(slots=7, scope="layer")
    assert (cache.capacity, cache.slots, len(cache.owner)) == (3, 6, 6)
    assert cache.access(1, np.array([0]), 0).slots.tolist() == [3]
    assert table(slots=7).capacity == table(slots=7).slots == 7


def test_narrow_ids_do_not_wrap() -> None:
    cache = Residency(40, 200, 40, make_policy("lru", 8000), "layer")
    assert cache.access(39, np.array([199], np.uint8), 0).slots.tolist() == [39]
    assert cache.owner[39] == 39 * 200 + 199


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: table(scope="pool"), "scope is 'pool'"),
        (lambda: table(slots=1, scope="layer"), "slots // pools = 1 // 2 = 0"),
        (
            lambda: Residency(2, 4, 4, make_policy("lru", 9)),
            "the policy's records 9 ≠ layers · experts = 2 · 4",
        ),
        (lambda: table(slots=2).access(0, np.arange(3), 0), "asked for 3 > 1 · 2 slots"),
        (lambda: table(scope="layer").access_token(np.zeros((3, 1), int), 0), "pools = 2 ≠ 3 layers"),
        (lambda: table().access_token(np.zeros((2, 1), int), 0), "pools = 1 ≠ 2 layers"),
        (lambda: table().landed(np.array([1])), "slots [1] landed"),
        (lambda: table().abandon(np.array([1])), "slots [1] abandoned"),
    ],
)
def test_our_own_mistakes_are_named(mistake: Callable[[], object], words: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(words)):
        mistake()


def test_what_arrives_is_never_evicted() -> None:
    cache = table()
    cache.access(0, np.arange(3), 0)
    with pytest.raises(AssertionError, match=re.escape("misses 2 > 1 slots not asked for nor arriving")):
        cache.access(1, np.arange(2), 1)


def test_the_clock_never_goes_back() -> None:
    cache = table()
    cache.access(0, np.array([0]), 5)
    cache.access(0, np.array([1]), 5)
    with pytest.raises(AssertionError, match="now = 4 < 5"):
        cache.access(0, np.array([2]), 4)


def test_check_states_the_broken_invariant() -> None:
    for scope, damage, words in (
        ("global", lambda t: t.owner.__setitem__(0, 3), "slot_of[owner[0]] = -1 ≠ 0"),
        ("global", lambda t: t.slot_of.__setitem__(7, 1), "records present 2 ≠ slots owned 1"),
        ("global", lambda t: t.arriving.__setitem__(3, True), "arriving[3] = True but owner[3] = -1"),
        (
            "layer",
            lambda t: (t.owner.__setitem__(0, 5), t.slot_of.__setitem__([0, 5], [-1, 0])),
            "slot 0 = 0 ≠ 1",
        ),
    ):
        cache = table(scope=scope)
        cache.access(0, np.array([0]), 0)
        cache.check()
        damage(cache)
        with pytest.raises(AssertionError, match=re.escape(words)):
            cache.check()


@given(
    st.integers(1, 1000).flatmap(
        lambda n: st.tuples(st.lists(st.integers(0, 9), min_size=n, max_size=n), st.integers(1, n), st.booleans())
    )
)
def test_lowest_breaks_ties_by_index(case: tuple[list[int], int, bool]) -> None:
    keys, count, twice = case
    expected = sorted(range(len(keys)), key=lambda i: (keys[i], i))[:count]
    rows = np.array([keys] * (1 + twice), np.float32)
    assert lowest(rows, count).tolist() == [expected] * (1 + twice)
