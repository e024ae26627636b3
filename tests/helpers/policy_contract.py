"""What every policy owes: a test class to inherit, with `spec` naming the policy under test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from synthetic_traces import synthetic

from offmoe.cache.arrays import Ints
from offmoe.cache.policies.base import Policy
from offmoe.cache.policy import policy_for
from offmoe.cache.residency import Access, Residency
from offmoe.cache.trace import Trace

LAYERS, EXPERTS, K, SLOTS = 3, 12, 3, 15


class PolicyContract:
    """Drives the policy through the table on a seeded trace, in both scopes."""

    spec: ClassVar[str]

    def make(self, trace: Trace) -> Policy:
        return policy_for(trace, self.spec)

    def table(self, scope: str) -> tuple[Residency, Trace]:
        trace = synthetic(120, LAYERS, EXPERTS, K, seed=3)
        return Residency(LAYERS, EXPERTS, SLOTS, self.make(trace), scope), trace

    def test_victims_have_the_lowest_score_and_then_slot(self) -> None:
        for scope in ("layer", "global"):
            table, trace = self.table(scope)
            evictions = 0
            for now, layer, asked in events(trace):
                before = table.owner.copy()
                access = take(table, layer, asked, now)
                assert access.evicted.tolist() == expected_victims(table, before, layer, asked, access, now)
                table.check()
                evictions += len(access.evicted)
            assert evictions > 50

    def test_runs_alike_twice_and_in_any_order_of_asking(self) -> None:
        for scope in ("layer", "global"):
            (first, trace), (second, _) = self.table(scope), self.table(scope)
            for now, layer, asked in events(trace):
                for table, ids in ((first, asked), (second, asked[::-1])):
                    take(table, layer, ids, now)
                assert (first.owner == second.owner).all()

    def test_scores_are_numbers_and_asking_changes_nothing(self) -> None:
        table, trace = self.table("layer")
        everything = np.arange(LAYERS * EXPERTS)
        for now, layer, asked in events(trace):
            take(table, layer, asked, now)
            scores = table.policy.score(everything, now)
            assert scores.shape == everything.shape
            assert not np.isnan(scores).any()
            assert (scores == table.policy.score(everything, now)).all()
            assert len(table.policy.score(np.array([-1, 0]), now)) == 2

    def test_state_is_what_a_kernel_can_hold(self) -> None:
        table, _ = self.table("layer")
        arrays = {n: a.dtype for n, a in vars(table.policy).items() if isinstance(a, np.ndarray)}
        assert arrays or not table.policy.state
        assert all(dtype in (np.int32, np.int64, np.float32) for dtype in arrays.values()), arrays

    def test_one_token_at_once_is_its_layers_in_turn(self) -> None:
        (one, trace), (many, _) = self.table("layer"), self.table("layer")
        for now, experts in enumerate(trace.experts):
            access = many.access_token(experts, now)
            arrive(many, access)
            turns = [take(one, layer, asked, now) for layer, asked in enumerate(experts)]
            for name in ("slots", "hit", "late", "evicted"):
                assert (getattr(access, name) == np.concatenate([getattr(t, name) for t in turns])).all()
        assert (one.owner == many.owner).all()


class OnlineContract(PolicyContract):
    """What a policy that knows no future owes besides."""

    def test_the_score_outlives_eviction(self) -> None:
        table, trace = self.table("layer")
        twin = self.make(trace)  # is told of uses only, as if nothing were ever evicted
        twin.attach(Residency(LAYERS, EXPERTS, SLOTS, self.make(trace), "layer"))
        everything = np.arange(LAYERS * EXPERTS)
        for now, layer, asked in events(trace):
            take(table, layer, asked, now)
            twin.touch(asked + layer * EXPERTS, now)
            assert (table.policy.score(everything, now) == twin.score(everything, now)).all()

    def test_uses_may_be_one_number_or_one_each(self) -> None:
        trace = synthetic(2, LAYERS, EXPERTS, K)
        one, each = self.make(trace), self.make(trace)
        for policy in (one, each):
            policy.attach(Residency(LAYERS, EXPERTS, SLOTS, self.make(trace), "layer"))
        for now, records in ((0, [1, 2, 5]), (3, [5, 7, 8])):
            one.touch(np.array(records), now, 2)
            each.touch(np.array(records), now, np.array([2, 2, 2]))
        everything = np.arange(LAYERS * EXPERTS)
        assert (one.score(everything, 4) == each.score(everything, 4)).all()


class BypassContract(PolicyContract):
    """What a policy that lets misses go by owes in place of choosing victims."""

    def test_victims_have_the_lowest_score_and_then_slot(self) -> None:
        """Among records present and requested, the highest scores stay, but nothing of the very lowest."""
        for scope in ("layer", "global"):
            table, trace = self.table(scope)
            for now, layer, asked in events(trace):
                slots = list(pool(table, layer))
                known = {*table.owner[slots].tolist(), *(asked + layer * table.experts).tolist()} - {-1}
                take(table, layer, asked, now)
                table.check()
                kept = table.owner[slots][table.owner[slots] >= 0]
                best = np.sort(table.policy.score(np.array([*known]), now))[-table.capacity :]
                assert np.sort(table.policy.score(kept, now)).tolist() == best[best > -np.inf].tolist()


def events(trace: Trace) -> Iterator[tuple[int, int, Ints]]:
    """(token, layer, experts asked for), in order."""
    for now, token in enumerate(trace.experts.astype(np.int64)):
        for layer, asked in enumerate(token):
            yield now, layer, asked


def take(table: Residency, layer: int, asked: Ints, now: int) -> Access:
    """One event whose uploads are done at once."""
    access = table.access(layer, asked, now)
    arrive(table, access)
    return access


def arrive(table: Residency, access: Access) -> None:
    table.landed(access.slots[~access.hit & (access.slots >= 0)])


def pool(table: Residency, layer: int) -> range:
    """The slots that this layer may use."""
    first = layer * table.capacity if table.scope == "layer" else 0
    return range(first, first + table.capacity)


def expected_victims(table: Residency, before: Ints, layer: int, asked: Ints, access: Access, now: int) -> list[int]:
    """The rule, said slowly: `before` is the table's owner before the access, nothing arriving."""
    slots = pool(table, layer)
    free = sum(before[slot] < 0 for slot in slots)
    needed = np.count_nonzero(~access.hit) - free
    others = [slot for slot in slots if before[slot] >= 0 and before[slot] not in asked + layer * EXPERTS]
    others.sort(key=lambda slot: (table.policy.score(before[[slot]], now)[0], slot))
    return [int(before[slot]) for slot in others[: max(0, needed)]]
