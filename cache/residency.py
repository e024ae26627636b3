"""Residency table: which record is in which slot; the engine, the replay and the tests share it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offmoe.cache.arrays import Flags, Ints, Numbers, SlotIds
from offmoe.cache.policies.base import Policy

NONE = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Access:
    """Outcome of a request for n records. Neither hit nor late: a miss, which is arriving from now on."""

    slots: SlotIds  # [n]; -1: missed and bypassed
    hit: Flags  # [n] in its slot when asked for
    late: Flags  # [n] on its way when asked for
    covered: Flags  # [n] of the hits, those that prefetching brought and nobody had used
    evicted: SlotIds  # [m] records that left


class Residency:
    """SlotIds over all layers, in pools: one a layer (scope "layer") or one for all ("global").

    Under layer scope, layer l owns slots [l·capacity, (l + 1)·capacity), capacity = slots // layers, and
    the remainder is left out: `slots` counts those in use. Record id = layer · experts + expert.
    """

    def __init__(self, layers: int, experts: int, slots: int, policy: Policy, scope: str = "layer") -> None:
        assert scope in ("layer", "global"), f"scope is {scope!r}, not layer or global"
        assert policy.records == layers * experts, (
            f"the policy's records {policy.records} ≠ layers · experts = {layers} · {experts}"
        )
        self.pools = layers if scope == "layer" else 1
        self.capacity = slots // self.pools  # of a pool: the most records that one access may hold
        assert self.capacity > 0, f"slots // pools = {slots} // {self.pools} = 0"
        self.layers, self.experts, self.slots = layers, experts, self.capacity * self.pools
        self.scope, self.policy, self.now = scope, policy, 0
        self.owner = np.full(self.slots, -1, np.int32)  # [slots] record, -1: free
        self.slot_of = np.full(layers * experts, -1, np.int32)  # [records], -1: absent
        self.arriving = np.zeros(self.slots, np.bool_)  # [slots] owned, its bytes not there yet
        self.prefetched = np.zeros(self.slots, np.bool_)  # [slots] owned by a prefetch, not used yet
        self.guarded: dict[int, SlotIds] = {}  # layer → slots that were prefetched for its next event
        self.leaving = NONE  # those of the last event: guarded until the next one
        self.wasted = 0  # prefetched records that were evicted unused
        policy.attach(self)

    def access(self, layer: int, experts: Ints, now: int, uses: Ints | int = 1) -> Access:
        """One event: `layer` asks for the distinct `experts` [n] at token `now`, which never goes back.

        All n are classified before any is admitted. The misses, by ascending record whatever the order asked,
        take the pool's free slots from the lowest, then those of the lowest score among the records that
        neither were asked for nor are arriving.
        """
        records = np.asarray(experts, np.int64) + layer * self.experts
        self.leaving = NONE
        access = self._event(layer if self.scope == "layer" else 0, 1, records, now, uses)
        self.leaving = self.guarded.pop(layer, NONE)
        return access

    def access_token(self, experts: Ints, now: int) -> Access:
        """The events of all layers of token `now` at once, `experts` [layers, n]; layer scope only.

        The same as `access` for each layer in turn, for pools do not touch one another; flat [layers · n].
        """
        assert self.pools == len(experts), f"pools = {self.pools} ≠ {len(experts)} layers"
        records = experts + np.arange(self.layers)[:, None] * self.experts
        return self._event(0, self.pools, records.reshape(-1), now, 1)

    def prefetch(self, layer: int, experts: Ints, now: int, most: int, held: Ints = NONE) -> tuple[Ints, SlotIds]:
        """Admit what is absent of predicted `experts`, in their order, at most `most`: (records, their slots).

        Policies are not told. Neither what the prediction names nor the slots `held` leave for it, nor what arrives;
        where that leaves too few slots, the last of the experts go without. What is admitted stays for the layer's next
        event, for which `most` must leave room, and until the event after that: a device's list of who may leave is as
        old as the event. A layer is predicted once between its events.
        """
        records = np.asarray(experts, np.int64) + layer * self.experts
        slots = self.slot_of[records]
        start = (layer if self.scope == "layer" else 0) * self.capacity
        kept = np.concatenate([slots[slots >= 0], held]) - start
        keys = self._keys(slice(start, start + self.capacity), kept[(kept >= 0) & (kept < self.capacity)], now)
        absent = records[slots < 0][: min(most, np.count_nonzero(keys < np.inf))]
        if not absent.size:
            return absent, NONE
        chosen = (lowest(keys[None], len(absent))[0] + start).astype(np.int32)
        self._fill(chosen, absent)
        self.prefetched[chosen] = True
        self.guarded[layer] = chosen
        return absent, chosen

    def waves(self, layer: int, experts: Ints, uses: Ints) -> list[Ints]:
        """The order in which to ask for experts, at most as many at a time as a pool holds: indices into `experts`.

        Where there are more experts than slots, resident ones come first, before others evict them, hottest last.
        """
        order = np.arange(len(experts))
        if len(experts) > self.capacity:
            resident = self.slot_of[layer * self.experts + experts] >= 0
            order = np.lexsort((uses, ~resident))
        return np.split(order, range(self.capacity, len(experts), self.capacity))

    def landed(self, slots: Ints) -> None:
        """The bytes of these arriving slots are there."""
        assert self.arriving[slots].all(), f"slots {slots} landed, arriving is {self.arriving[slots]}"
        self.arriving[slots] = False

    def abandon(self, slots: Ints) -> None:
        """These arriving slots will not be filled: free again, their records absent."""
        assert self.arriving[slots].all(), f"slots {slots} abandoned, arriving is {self.arriving[slots]}"
        self.slot_of[self.owner[slots]] = -1
        self.owner[slots] = -1
        self.arriving[slots] = False
        self.prefetched[slots] = False

    def _event(self, pool: int, pools: int, records: Ints, now: int, uses: Ints | int) -> Access:
        """`records` [pools · n]: n of each pool from `pool` on."""
        assert now >= self.now, f"now = {now} < {self.now}, the last access's"
        assert len(records) <= pools * self.capacity, f"asked for {len(records)} > {pools} · {self.capacity} slots"
        self.now = now
        slots = self.slot_of[records]
        late = self.arriving[slots]
        hit = ~late
        covered = self.prefetched[slots] & hit & (slots >= 0)
        self.prefetched[slots[slots >= 0]] = False
        self.policy.touch(records, now, uses)
        missed = (slots < 0).nonzero()[0]
        if not missed.size:
            return Access(slots, hit, late, covered, NONE)
        missed = missed[records[missed].argsort()]
        late[missed] = hit[missed] = False
        return Access(slots, hit, late, covered, self._admit(pool, pools, records, slots, missed, now))

    def _admit(self, pool: int, pools: int, records: Ints, slots: SlotIds, missed: Ints, now: int) -> SlotIds:
        """Give the records[missed] slots, written into `slots`; returns the records evicted."""
        start = pool * self.capacity
        held = NONE if self.policy.bypass else slots[slots >= 0] - start
        keys = self._keys(slice(start, start + pools * self.capacity), held, now)
        row = missed // (len(records) // pools)  # the pool of each miss, ascending
        rank = np.arange(len(row)) - row.searchsorted(row)  # among the misses of its pool
        chosen = lowest(keys.reshape(pools, -1), int(rank.max()) + 1)[row, rank] + row * self.capacity
        if self.policy.bypass:
            worth = self.policy.score(records[missed], now)
            worthiest = np.lexsort((-worth, row))  # first in every pool, against the lowest keys
            enters = worth[worthiest] > keys[chosen]
            missed, chosen = missed[worthiest][enters], chosen[enters]
        assert (keys[chosen] < np.inf).all(), (
            f"misses {len(missed)} > {np.count_nonzero(keys < np.inf)} slots not asked for nor arriving"
        )
        slots[missed] = chosen + start
        return self._fill(slots[missed], records[missed])

    def _keys(self, area: slice, held: Ints, now: int) -> Numbers:
        """The order in which the slots of `area` go: free ones first; arriving and `held` ones never."""
        owner = self.owner[area]
        keys: Numbers = np.where(owner < 0, -np.inf, self.policy.score(owner, now))
        keys[self.arriving[area]] = np.inf
        for slots in (*self.guarded.values(), self.leaving):
            inside = slots[(slots >= area.start) & (slots < area.stop)]
            keys[inside - area.start] = np.inf
        keys[held] = np.inf
        return keys

    def _fill(self, slots: SlotIds, records: Ints) -> SlotIds:
        """`records` own `slots` from now on, arriving; returns those that did."""
        evicted = self.owner[slots]
        evicted = evicted[evicted >= 0]
        self.wasted += int(np.count_nonzero(self.prefetched[slots]))
        self.prefetched[slots] = False
        self.slot_of[evicted] = -1
        self.slot_of[records] = slots
        self.owner[slots] = records
        self.arriving[slots] = True
        return evicted

    def check(self) -> None:
        """AssertionError names the invariant that does not hold."""
        owned = np.flatnonzero(self.owner >= 0)
        back = self.slot_of[self.owner[owned]]
        bad = owned[back != owned]
        assert not bad.size, f"slot_of[owner[{bad[0]}]] = {self.slot_of[self.owner[bad[0]]]} ≠ {bad[0]}"
        present = np.count_nonzero(self.slot_of >= 0)
        assert present == len(owned), f"records present {present} ≠ slots owned {len(owned)}"
        adrift = np.flatnonzero(self.arriving & (self.owner < 0))
        assert not adrift.size, f"arriving[{adrift[0]}] = True but owner[{adrift[0]}] = -1"
        if self.scope == "layer":
            pool, layer = owned // self.capacity, self.owner[owned] // self.experts
            bad = np.flatnonzero(pool != layer)
            assert not bad.size, f"pool of slot {owned[bad[0]]} = {pool[bad[0]]} ≠ {layer[bad[0]]} = its record's layer"


def lowest(keys: Numbers, count: int) -> Ints:
    """The indices of the `count` lowest of each row of `keys` [rows, n], ascending, ties by index."""
    rows, n = keys.shape
    if rows > 1 or n <= 256:
        return keys.argsort(axis=1, kind="stable")[:, :count]
    cut = np.partition(keys[0], count - 1)[count - 1]  # sorting 5,000 takes 150 µs, this 10
    near = np.flatnonzero(keys[0] <= cut)
    first: Ints = near[keys[0, near].argsort(kind="stable")[:count]]
    return first[None]
