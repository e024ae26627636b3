"""Residency on the device: which slots a layer's records lie in, who leaves for those that lie in none.

The choices are those of cache.residency.Residency, bit for bit: a score is a fraction of two whole numbers (a float32
that is not negative orders as its bits), fractions are compared by cross-multiplication, ties go to the lowest slot.
Scanning a pool is done beside the critical path: `candidates` lists the slots that would leave first, and `resolve`,
inside the router's kernel, takes from the list what this event does not need.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

KINDS = {"lru": 0, "lfu": 1, "lfru": 2, "crf": 3}
LRU, LFU, LFRU, CRF = (tl.constexpr(kind) for kind in range(4))
# Words of a step's counters, in the order of kernels.ring; what is uploaded counts in units of 16 bytes.
HITS, COVERED, LATE, MISSES, WASTED, UPLOADED = (tl.constexpr(word) for word in range(6))
NEVER = tl.constexpr(1 << 40)  # the numerator of what must not leave


@triton.jit
def crf_score(a, b, decay, decays, record, now, mask):
    """value · 2^(-age / h) float32 at token `now`; the product alone, so that nothing is fused into it."""
    value = tl.load(a + record, mask=mask, other=0).to(tl.float32, bitcast=True)
    age = tl.minimum(now - tl.load(b + record, mask=mask, other=0), decays - 1)
    return value * tl.load(decay + age, mask=mask, other=0.0)


@triton.jit
def lower(n0, d0, s0, n1, d1, s1):
    """Of two slots the one that leaves first: the smaller fraction, then the smaller slot."""
    left, right = n0 * d1, n1 * d0
    first = (left < right) | ((left == right) & (s0 < s1))
    return tl.where(first, n0, n1), tl.where(first, d0, d1), tl.where(first, s0, s1)


@triton.jit
def _candidates(
    owner, arriving, a, b, decay, decays, clock, out, capacity,
    C: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Grid (pools): the C slots of a pool that leave first, in that order; -1 where there are no more."""
    pool = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    slot = pool * capacity + i
    inside = i < capacity
    record = tl.load(owner + slot, mask=inside, other=-1)
    owned = inside & (record >= 0)
    now = tl.load(clock)
    if KIND == CRF:
        number = crf_score(a, b, decay, decays, record, now, owned).to(tl.int32, bitcast=True).to(tl.int64)
    else:
        number = tl.load(a + record, mask=owned, other=0).to(tl.int64)
    number = tl.where(owned, number, -1)  # free slots go first
    number = tl.where(inside & (tl.load(arriving + slot, mask=inside, other=0) == 0), number, NEVER)
    if KIND == LFRU:
        age = (now - tl.load(b + record, mask=owned, other=0) + 1).to(tl.int64)
        age = tl.where(owned, age, 1)
        for c in range(C):
            n, _, first = tl.reduce((number, age, slot.to(tl.int64)), 0, lower)
            tl.store(out + pool * C + c, tl.where(n < NEVER, first, -1).to(tl.int32))
            number = tl.where(slot == first, NEVER, number)
            age = tl.where(slot == first, 1, age)
    else:
        place = i.to(tl.int64)
        never = tl.full((BLOCK,), NEVER, tl.int64) << 20 | place
        key = tl.where(number == NEVER, never, (number + 1) << 20 | place)
        for c in range(C):
            first = tl.min(key, 0)
            found = first >> 20 < NEVER
            tl.store(out + pool * C + c, tl.where(found, pool * capacity + (first & 0xFFFFF), -1).to(tl.int32))
            key = tl.where(key == first, never, key)


def candidates(
    owner: Tensor, arriving: Tensor, a: Tensor, b: Tensor, decay: Tensor, clock: Tensor, out: Tensor,
    *, kind: str,
) -> None:  # fmt: skip
    """out [pools, C] int32: of every pool of owner's slots, those that would leave first at token clock[0]."""
    pools, count = out.shape
    capacity = owner.numel() // pools
    assert capacity <= 1 << 20
    _candidates[(pools,)](
        owner, arriving, a, b, decay, decay.numel(), clock, out, capacity, C=count,
        BLOCK=triton.next_power_of_2(capacity), KIND=KINDS[kind], num_warps=4 if capacity <= 1024 else 16,
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def pick(candidate, held, present, arriving, wanted, rank, C: tl.constexpr):
    """For each wanted [K] the rank-th candidate [C] that is neither held [H] (where present) nor arriving."""
    there = candidate >= 0
    taken = tl.sum(((candidate[:, None] == held[None, :]) & present[None, :]).to(tl.int32), 1) > 0
    usable = there & ~taken & (tl.load(arriving + candidate, mask=there, other=1) == 0)
    i = tl.arange(0, C)
    before = tl.sum((usable[None, :] & (i[None, :] < i[:, None])).to(tl.int32), 1)
    chosen = usable[None, :] & (before[None, :] == rank[:, None]) & wanted[:, None]
    return tl.sum(tl.where(chosen, candidate[None, :] + 1, 0), 1) - 1


@triton.jit
def admit(slot, record, wanted, slot_of, owner, arriving, fresh, counters, PREFETCHED: tl.constexpr):
    """Records take slots: who owned them is absent from now on."""
    old = tl.load(owner + slot, mask=wanted, other=-1)
    unused = tl.load(fresh + slot, mask=wanted & (old >= 0), other=0)
    tl.store(slot_of + old, tl.full(old.shape, -1, tl.int32), mask=wanted & (old >= 0))
    tl.store(owner + slot, record, mask=wanted)
    tl.store(slot_of + record, slot, mask=wanted)
    tl.store(arriving + slot, slot * 0 + PREFETCHED, mask=wanted)
    tl.store(fresh + slot, slot * 0 + PREFETCHED, mask=wanted)
    add(counters + WASTED, tl.sum(unused, 0))


@triton.jit
def add(counter, count):
    tl.store(counter, tl.load(counter) + count)


@triton.jit
def resolve(
    ids, k, layer, first_record, slot_of, owner, arriving, fresh, landed, a, b, decay, decays, clock, candidate_row,
    status, slots, hit, miss_count, miss_records, miss_slots, fetch_count, fetch_slots,
    counters, log, units, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, KIND: tl.constexpr, PREFETCHED: tl.constexpr,
):  # fmt: skip
    """One event: ids [KP] in the router's order, k of them real. All are classified before any is admitted."""
    j = tl.arange(0, KP)
    real = j < k
    record = first_record + ids
    running = tl.load(status) == 0
    slot = tl.load(slot_of + record, mask=real, other=-1)
    present = real & (slot >= 0)
    flying, here = present & (slot < 0), present
    if PREFETCHED:
        flying = present & (tl.load(arriving + slot, mask=present, other=0) != 0)
        here = present & (~flying | (tl.load(landed + slot, mask=present, other=0) != 0))
    missed = real & ~present & running
    rank = tl.sum((missed[None, :] & (record[None, :] < record[:, None])).to(tl.int32), 1)
    c = tl.arange(0, CP)
    candidate = tl.load(candidate_row + c, mask=c < C, other=-1)
    new = pick(candidate, slot, present, arriving, missed, rank, CP)
    now, event = tl.load(clock), tl.load(clock + 1) + 1
    if KIND == CRF:
        value = crf_score(a, b, decay, decays, record, now, real) + 1.0
    else:
        value = tl.load(a + record, mask=real, other=0) + 1
    tl.debug_barrier()  # all have read what is written below
    touched = real & running
    if KIND == CRF:
        tl.store(a + record, value.to(tl.int32, bitcast=True), mask=touched)
    elif KIND == LRU:
        tl.store(a + record, value * 0 + event, mask=touched)
    else:
        tl.store(a + record, value, mask=touched)
    if (KIND == CRF) | (KIND == LFRU):
        tl.store(b + record, record * 0 + now, mask=touched)
    admit(new, record, missed & (new >= 0), slot_of, owner, arriving, fresh, counters, 0)
    if PREFETCHED:
        covered = flying & here
        f = tl.arange(0, KP)  # from now on what was fetched for this event is like any other
        fetched = tl.load(fetch_slots + f, mask=f < tl.load(fetch_count), other=0)
        tl.store(arriving + fetched, fetched * 0, mask=(f < tl.load(fetch_count)) & running)
        tl.store(fresh + slot, slot * 0, mask=present & running)
        late = flying & ~here
        add(counters + COVERED, tl.sum((covered & running).to(tl.int32), 0))
        add(counters + LATE, tl.sum((late & running).to(tl.int32), 0))
    misses = tl.sum(missed.to(tl.int32), 0)
    tl.store(slots + j, tl.maximum(tl.where(missed, new, slot), 0), mask=real)
    tl.store(hit + j, here.to(tl.int32), mask=real)
    tl.store(miss_count, misses)
    tl.store(miss_records + rank, record, mask=missed)
    tl.store(miss_slots + rank, new, mask=missed)
    tl.store(log + layer * k + j, ids, mask=touched)
    if running:
        tl.store(clock + 1, event)
        add(counters + HITS, tl.sum(here.to(tl.int32), 0))
        add(counters + MISSES, misses)
        add(counters + UPLOADED, misses * units)


@triton.jit
def prefetch(
    ids, likely, first_record, slot_of, owner, arriving, fresh, landed, candidate_row, held, held_count, status,
    fetch_count, fetch_records, fetch_slots, counters, most, units,
    KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Of predicted ids [KP], those that are `likely` and absent, at most `most`, take slots and are on their way.

    Neither what the prediction itself names nor `held` [held_count] leaves for them. They stay at least until the
    event of their layer: `arriving` falls there, landed or not.
    """
    record = first_record + ids
    running = tl.load(status) == 0
    slot = tl.load(slot_of + record, mask=likely, other=-1)
    present = likely & (slot >= 0)
    absent = likely & ~present & running
    j = tl.arange(0, KP)
    rank = tl.sum((absent[None, :] & (j[None, :] < j[:, None])).to(tl.int32), 1)
    h = tl.arange(0, HELD)
    others = tl.load(held + h, mask=h < held_count, other=-1)
    c = tl.arange(0, CP)
    candidate = tl.load(candidate_row + c, mask=c < C, other=-1)
    in_use = tl.sum((candidate[:, None] == others[None, :]).to(tl.int32), 1) > 0
    candidate = tl.where(in_use, -1, candidate)
    new = pick(candidate, slot, present, arriving, absent & (rank < most), rank, CP)
    wanted = absent & (rank < most) & (new >= 0)
    tl.debug_barrier()
    admit(new, record, wanted, slot_of, owner, arriving, fresh, counters, 1)
    tl.store(landed + new, slot * 0, mask=wanted)
    count = tl.sum(wanted.to(tl.int32), 0)
    tl.store(fetch_count, count)
    tl.store(fetch_records + rank, record, mask=wanted)
    tl.store(fetch_slots + rank, new, mask=wanted)
    if running:
        add(counters + UPLOADED, count * units)
