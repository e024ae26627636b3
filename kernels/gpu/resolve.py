"""Residency on the GPU: which slots hold a layer's records, and which records are evicted for the missing ones.

The choices are those of cache.residency.Residency, bit for bit: a score is a fraction of two integers (a float32 is
ordered by its bits, see `ordered`), fractions are compared by cross-multiplication, ties go to the lowest slot.

Pools are scanned off the critical path: `candidates` lists the slots that would be evicted first. `look` reads the
table's state of all experts of the layer while the router multiplies; `resolve` then reads nothing more. It works on
vectors over the experts, in whose order records ascend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {"lru": 0, "lfu": 1, "lfru": 2, "crf": 3, "echo": 3, "formula": 4}  # echo: crf and what is foretold
LRU, LFU, LFRU, CRF, FORMULA = (tl.constexpr(kind) for kind in range(5))  # from LFRU on, b is the token of the last use
# Words of a step's counters, in the order of kernels.ring; what is uploaded counts in units of 16 bytes.
HITS, COVERED, LATE, MISSES, WASTED, UPLOADED = (tl.constexpr(word) for word in range(6))
COUNTED = tl.constexpr(8)
# Below and above all numerators: a free slot's, and of what must not leave. Times a denominator they still fit int64.
FREE, NEVER = tl.constexpr(-(1 << 31) - 1), tl.constexpr(1 << 31)
PART = 1024  # slots of a pool that one program ranks, where several share a pool


@triton.jit
def lower(n0, d0, s0, n1, d1, s1):
    """Return the slot that is evicted first of two: the one of smaller fraction n / d, then of smaller slot s."""
    left, right = n0 * d1, n1 * d0
    first = (left < right) | ((left == right) & (s0 < s1))
    return tl.where(first, n0, n1), tl.where(first, d0, d1), tl.where(first, s0, s1)


@triton.jit
def ordered(value):
    """Return int32 keys ordered as the float32 `value`; -0 equals 0, and NaN has a defined position."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def list_first(
    slot, inside, owner, arriving, a, b, decay, decays, clock, foretold, out,
    C: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, WORTH: tl.constexpr,
):  # fmt: skip
    """Write the first C slots to evict out of `slot` [BLOCK] into out [C], in order; -1 pads the list."""
    record = tl.load(owner + slot, mask=inside, other=-1)
    owned = inside & (record >= 0)
    stays = tl.load(arriving + slot, mask=inside, other=1) != 0
    now = tl.load(clock)
    number = tl.load(a + record, mask=owned, other=0)
    age = tl.zeros((BLOCK,), tl.int32)
    if KIND >= LFRU:
        age = tl.where(owned, now - tl.load(b + record, mask=owned, other=0), 0)
    if KIND == CRF:
        faded = tl.load(decay + tl.minimum(age, decays - 1), mask=owned, other=0.0)
        worth = number.to(tl.float32, bitcast=True) * faded  # rounded before the sum: compiled without fusing
        if foretold is not None:
            worth += tl.load(foretold + record, mask=owned, other=0.0)
        number = worth.to(tl.int32, bitcast=True)
    if KIND == FORMULA:
        worth = WORTH(number.to(tl.float32, bitcast=True), age.to(tl.float32))
        number = ordered(tl.where(owned, worth, 0.0).to(tl.float32))
    number = tl.where(owned, number.to(tl.int64), FREE)
    number = tl.where(stays, NEVER, number)
    position = tl.where(inside, slot, 0).to(tl.int64)
    if KIND == LFRU:
        age = tl.where(stays, 1, age.to(tl.int64) + 1)
        for c in range(C):
            n, _, first = tl.reduce((number, age, position), 0, lower)
            tl.store(out + c, tl.where(n < NEVER, first, -1).to(tl.int32))
            number = tl.where(position == first, NEVER, number)
            age = tl.where(position == first, 1, age)
    else:
        end: tl.constexpr = NEVER << 20
        key = number << 20 | position
        for c in range(C):
            first = tl.min(key, 0)
            tl.store(out + c, tl.where(first < end, first & 0xFFFFF, -1).to(tl.int32))
            key = tl.where(key == first, end | position, key)


@triton.jit
def _candidates(
    owner, arriving, a, b, decay, decays, clock, foretold, out, scratch, capacity, parts,
    C: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr, KIND: tl.constexpr, WORTH: tl.constexpr,
):  # fmt: skip
    """Grid (pools, parts): each program lists its part; with several parts, the last to finish merges the lists."""
    pool, part = tl.program_id(0), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    target = out + pool * C
    if MERGED:
        target = scratch + 1 + part * C
    list_first(pool * capacity + i, i < capacity, owner, arriving, a, b, decay, decays, clock, foretold, target,
               C, BLOCK, KIND, WORTH)  # fmt: skip
    if MERGED:
        tl.debug_barrier()  # all threads' stores come before the ticket
        if tl.atomic_add(scratch, 1, sem="acq_rel") == parts - 1:
            tl.store(scratch, 0)
            j = tl.arange(0, MERGED)
            slot = tl.load(scratch + 1 + j, mask=j < parts * C, other=-1, cache_modifier=".cg")
            list_first(slot, slot >= 0, owner, arriving, a, b, decay, decays, clock, foretold, out, C, MERGED,
                       KIND, WORTH)  # fmt: skip


def candidates(
    owner: Tensor, arriving: Tensor, a: Tensor, b: Tensor, decay: Tensor, clock: Tensor, out: Tensor,
    *, kind: str, scratch: Tensor | None = None, foretold: Tensor | None = None, worth: Any = None,
) -> None:  # fmt: skip
    """Write into out [pools, C] int32 the slots of every pool that would be evicted first at token clock[0].

    `scratch` int32 [scratch_size()], zero before the first launch, lets several programs share a large pool. `foretold`
    [records] float32 is added to the score by policy echo; `worth` is the scoring function of a formula policy.
    """
    pools, count = out.shape
    capacity = owner.numel() // pools
    assert capacity <= 1 << 20
    parts = 1 if scratch is None or pools > 1 else triton.cdiv(capacity, PART)
    block = triton.next_power_of_2(capacity) if parts == 1 else PART
    _candidates[(pools, parts)](
        owner, arriving, a, b, decay, decay.numel(), clock, foretold, out, scratch, capacity, parts,
        C=count, BLOCK=block, MERGED=0 if parts == 1 else triton.next_power_of_2(parts * count), KIND=KINDS[kind],
        WORTH=worth, num_warps=4 if block <= 1024 else 16, enable_fp_fusion=False,
    )  # fmt: skip


def scratch_size(slots: int, count: int) -> int:
    """Return the int32 words of `candidates`' scratch for a pool of `slots`: a ticket, and a list per part."""
    return 1 + triton.cdiv(slots, PART) * count


class Seen(NamedTuple):
    """Result of `look`: vectors over the layer's experts [EP], the candidates [CP] and the fetched slots [KP]."""

    slot: Any  # [EP] of the expert, -1: absent
    state: Any  # [EP] 0 absent, 1 resident, 2 resident by an unused prefetch, 3 arriving
    value: Any  # [EP] the policy's value after a use
    candidate: Any  # [CP] slot, -1: cannot be evicted
    old: Any  # [CP] record in the candidate's slot, -1: free
    unused: Any  # [CP] 1 where that record was prefetched and has not been used
    fetched: Any  # [KP] slots prefetched for this event, -1 padded
    now: Any  # the token
    event: Any  # the number of this event
    counts: Any  # [COUNTED] the step's counters
    running: Any  # whether status is RUN


@triton.jit
def look(
    first_record, experts, slot_of, owner, arriving, fresh, landed, a, b, decay, decays, clock, candidate_row,
    fetch_count, fetch_slots, counters, status,
    EP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, KIND: tl.constexpr, USE: tl.constexpr,
    PREFETCHED: tl.constexpr,
):  # fmt: skip
    """Read all that an event needs of the table, before the router has chosen."""
    e, c, w = tl.arange(0, EP), tl.arange(0, CP), tl.arange(0, COUNTED)
    there = e < experts
    slot = tl.load(slot_of + first_record + e, mask=there, other=-1)
    candidate = tl.load(candidate_row + c, mask=c < C, other=-1)
    value = tl.load(a + first_record + e, mask=there, other=0)
    now, event = tl.load(clock), tl.load(clock + 1) + 1
    counts, running = tl.load(counters + w), tl.load(status) == 0
    present, known = slot >= 0, candidate >= 0
    state = tl.load(fresh + slot, mask=present, other=-1) + 1
    old = tl.load(owner + candidate, mask=known, other=-1)
    unused = tl.load(fresh + candidate, mask=known, other=0)
    fetched = tl.full((KP,), -1, tl.int32)
    if PREFETCHED:
        f = tl.arange(0, KP)
        fetched = tl.load(fetch_slots + f, mask=f < tl.load(fetch_count), other=-1)
        flying = tl.load(arriving + slot, mask=present, other=0) != 0
        # never from L1: the copy may end meanwhile
        whole = tl.load(landed + slot, mask=present, other=0, volatile=True) != 0
        state = tl.where(flying & ~whole, 3, state)
        candidate = tl.where(tl.load(arriving + candidate, mask=known, other=0) != 0, -1, candidate)
    if KIND == CRF:  # the product is rounded before the sum: compiled without fusing
        age = now - tl.load(b + first_record + e, mask=there, other=0)
        faded = tl.load(decay + tl.minimum(age, decays - 1), mask=there, other=0.0)
        value = (value.to(tl.float32, bitcast=True) * faded + 1.0).to(tl.int32, bitcast=True)
    elif KIND == FORMULA:
        age = now - tl.load(b + first_record + e, mask=there, other=0)
        used = USE(value.to(tl.float32, bitcast=True), age.to(tl.float32), tl.full((EP,), 1.0, tl.float32))
        value = tl.where(there, used, 0.0).to(tl.float32).to(tl.int32, bitcast=True)
    elif KIND == LRU:
        value = value * 0 + event
    else:
        value += 1
    return Seen(slot, state, value, candidate, old, unused, fetched, now, event, counts, running)


@triton.jit
def resolve(
    seen, rank, chosen, k, layer, first_record, slot_of, owner, arriving, fresh, a, b, clock,
    slots, hit, miss_count, miss_records, miss_slots, counters, log, units,
    EP: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, KIND: tl.constexpr, PREFETCHED: tl.constexpr,
    VARIES: tl.constexpr,
):  # fmt: skip
    """Resolve one event from what `look` has `seen`; rank [EP] is an expert's rank among the `chosen` ≤ k, else ≥
    chosen.

    VARIES: ranks from `chosen` to k get slot, hit and id -1. All experts are classified before any is admitted. Misses,
    by ascending record, take the candidates in order, skipping those that this event asks for. Outputs are in the
    router's order, the miss list is by ascending record.
    """
    e, c = tl.arange(0, EP), tl.arange(0, CP)
    record = first_record + e
    asked = rank < chosen
    touched = asked & seen.running
    missed = touched & (seen.state == 0)
    here = asked & ((seen.state == 1) | (seen.state == 2))
    # Four counts of at most 16 in one sum, a byte each.
    word = here.to(tl.int32) | missed.to(tl.int32) << 8 | (seen.state == 2).to(tl.int32) << 16
    total = tl.sum(tl.where(touched, word | (seen.state == 3).to(tl.int32) << 24, 0), 0)
    misses = total >> 8 & 255
    miss_rank = tl.cumsum(missed.to(tl.int32), 0) - 1
    needed = tl.sum(((seen.candidate[None, :] == seen.slot[:, None]) & asked[:, None]).to(tl.int32), 0) > 0
    usable = (seen.candidate >= 0) & ~needed
    before = tl.sum((usable[:, None] & (c[:, None] < c[None, :])).to(tl.int32), 0)
    leaves = usable & (before < misses)
    match = leaves[:, None] & (before[:, None] == miss_rank[None, :])
    new = tl.where(missed, tl.sum(tl.where(match, seen.candidate[:, None], 0), 0), seen.slot)

    tl.store(slot_of + seen.old, seen.old * 0 - 1, mask=leaves & (seen.old >= 0))
    tl.store(fresh + seen.candidate, seen.old * 0, mask=leaves)
    tl.store(owner + new, record, mask=missed)
    tl.store(slot_of + record, new, mask=missed)
    tl.store(a + record, seen.value, mask=touched)
    if KIND >= LFRU:
        tl.store(b + record, record * 0 + seen.now, mask=touched)
    tl.store(fresh + seen.slot, seen.slot * 0, mask=touched & (seen.state >= 2))
    if PREFETCHED:  # what was prefetched for this event is resident from now on
        tl.store(arriving + seen.fetched, seen.fetched * 0, mask=(seen.fetched >= 0) & seen.running)
    tl.store(slots + rank, tl.maximum(new, 0), mask=asked)
    tl.store(hit + rank, here.to(tl.int32), mask=asked)
    if VARIES:
        j = tl.arange(0, KP)
        empty = (j >= chosen) & (j < k)
        tl.store(slots + j, j * 0 - 1, mask=empty)
        tl.store(hit + j, j * 0 - 1, mask=empty)
        tl.store(log + layer * k + j, j * 0 - 1, mask=empty & seen.running)
    tl.store(miss_count, misses)
    tl.store(miss_records + miss_rank, record, mask=missed)
    tl.store(miss_slots + miss_rank, new, mask=missed)
    tl.store(log + layer * k + rank, e, mask=touched)
    if seen.running:
        tl.store(clock + 1, seen.event)
        w = tl.arange(0, COUNTED)
        wasted = tl.sum(tl.where(leaves & (seen.old >= 0), seen.unused, 0), 0)
        counts = seen.counts
        counts += tl.where(w == HITS, total & 255, 0) + tl.where(w == COVERED, total >> 16 & 255, 0)
        counts += tl.where(w == LATE, total >> 24, 0) + tl.where(w == MISSES, misses, 0)
        counts += tl.where(w == WASTED, wasted, 0) + tl.where(w == UPLOADED, misses * units, 0)
        tl.store(counters + w, counts)


@triton.jit
def pick(candidate, held, present, arriving, wanted, rank, CP: tl.constexpr):
    """Return for each wanted [K] the rank-th candidate [CP] that is neither held [H] (where present) nor arriving."""
    there = candidate >= 0
    taken = tl.sum(((candidate[:, None] == held[None, :]) & present[None, :]).to(tl.int32), 1) > 0
    usable = there & ~taken & (tl.load(arriving + candidate, mask=there, other=1) == 0)
    i = tl.arange(0, CP)
    before = tl.sum((usable[None, :] & (i[None, :] < i[:, None])).to(tl.int32), 1)
    chosen = usable[None, :] & (before[None, :] == rank[:, None]) & wanted[:, None]
    return tl.sum(tl.where(chosen, candidate[None, :] + 1, 0), 1) - 1


@triton.jit
def prefetch(
    ids, likely, first_record, slot_of, owner, arriving, fresh, landed, candidate_row, held, held_count, status,
    fetch_count, fetch_records, fetch_slots, counters, most, units,
    KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Admit those of the predicted ids [KP] that are `likely` and absent, at most `most`; list them to be fetched.

    Neither the records that the prediction names nor the slots `held` [held_count] are evicted for them. They stay at
    least until the event of their layer, which clears `arriving`, landed or not.
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
    old = tl.load(owner + new, mask=wanted, other=-1)
    unused = tl.load(fresh + new, mask=wanted & (old >= 0), other=0)
    count, wasted = tl.sum(wanted.to(tl.int32), 0), tl.sum(unused, 0)
    w = tl.arange(0, COUNTED)
    counts = tl.load(counters + w) + tl.where(w == WASTED, wasted, 0) + tl.where(w == UPLOADED, count * units, 0)
    tl.debug_barrier()  # all have read what is written below
    tl.store(slot_of + old, old * 0 - 1, mask=wanted & (old >= 0))
    tl.store(owner + new, record, mask=wanted)
    tl.store(slot_of + record, new, mask=wanted)
    tl.store(arriving + new, new * 0 + 1, mask=wanted)
    tl.store(fresh + new, new * 0 + 1, mask=wanted)
    tl.store(landed + new, new * 0, mask=wanted)
    tl.store(fetch_count, count)
    tl.store(fetch_records + rank, record, mask=wanted)
    tl.store(fetch_slots + rank, new, mask=wanted)
    if running:
        tl.store(counters + w, counts)


@triton.jit
def _evaluate(value, age, uses, out, n, BLOCK: tl.constexpr, USE: tl.constexpr, WORTH: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < n
    v, a = tl.load(value + i, mask=inside, other=1.0), tl.load(age + i, mask=inside, other=1.0)
    u = tl.load(uses + i, mask=inside, other=1.0)
    tl.store(out + i, tl.where(inside, USE(v, a, u), 0.0).to(tl.float32), mask=inside)
    tl.store(out + n + i, tl.where(inside, WORTH(v, a), 0.0).to(tl.float32), mask=inside)


def evaluate(value: Tensor, age: Tensor, uses: Tensor, *, use: Any, worth: Any) -> Tensor:
    """Return [2, n] float32: a formula's value after `uses` [n], and its worth before, for `value` and `age` [n]."""
    n = value.numel()
    out = torch.empty((2, n), device=value.device)
    _evaluate[(1,)](
        value, age, uses, out, n, BLOCK=triton.next_power_of_2(n), USE=use, WORTH=worth, enable_fp_fusion=False
    )
    return out
