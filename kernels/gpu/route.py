"""Norm, router, top-k and residency in one launch; and the same a few layers ahead, to predict.

A few programs each make some of the router's logits; the last to finish has them all and decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.resolve import KINDS, prefetch, resolve

EACH = 4  # experts whose logits one program makes
RANKED = tl.constexpr(256)  # up to so many experts are ranked by comparing all with all, in one go


@dataclass(frozen=True)
class Table:
    """Residency on the device, all int32: [records], [slots], and the policy's two arrays [records]."""

    slot_of: Tensor
    owner: Tensor
    arriving: Tensor
    fresh: Tensor  # prefetched and not used yet
    landed: Tensor
    progress: Tensor  # chunks of an arriving record, for page_in
    a: Tensor
    b: Tensor
    decay: Tensor  # float32
    clock: Tensor  # token, event
    candidates: Tensor  # [layers or 1, C]
    kind: str  # of the policy


@triton.jit
def router_logits(x, norm, router, logits, normed, raw, eps, experts, H: tl.constexpr, WIDE: tl.constexpr,
                  EACH: tl.constexpr, WRITE: tl.constexpr):  # fmt: skip
    """Of the program's experts; the first program leaves the normed x behind, and x as it was for who predicts."""
    i = tl.arange(0, WIDE)
    inside = i < H
    value = tl.load(x + i, mask=inside, other=0.0)
    if WRITE:
        if raw is not None:
            if tl.program_id(0) == 0:
                tl.store(raw + i, value, mask=inside)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / H + eps) * tl.load(norm + i, mask=inside, other=0.0)
    if WRITE:
        if tl.program_id(0) == 0:
            tl.store(normed + i, value, mask=inside)
    expert = tl.program_id(0) * EACH + tl.arange(0, EACH)
    there = expert < experts
    weight = tl.load(router + expert[:, None] * H + i[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    tl.store(logits + expert, tl.sum(weight.to(tl.float32) * value[None, :], 1), mask=there)


@triton.jit
def last_arriver(ticket):
    """True in the program that finishes last; the ticket is 0 again."""
    tl.debug_barrier()  # all threads' stores come before the ticket
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def probabilities(logits, experts, EP: tl.constexpr):
    """Softmax over all experts [EP], 0 beyond."""
    e = tl.arange(0, EP)
    value = tl.load(logits + e, mask=e < experts, other=-float("inf"), cache_modifier=".cg")
    power = tl.exp(value - tl.max(value, 0))
    return value, power / tl.sum(power, 0)


@triton.jit
def most_likely(value, p, k, EP: tl.constexpr, KP: tl.constexpr):
    """The k largest of value [EP], the lowest of equals first: ids and p of them [KP]."""
    e, j = tl.arange(0, EP), tl.arange(0, KP)
    ids, chosen = tl.zeros((KP,), tl.int32), tl.zeros((KP,), tl.float32)
    if EP <= RANKED:
        above = (value[None, :] > value[:, None]) | ((value[None, :] == value[:, None]) & (e[None, :] < e[:, None]))
        rank = tl.sum(above.to(tl.int32), 1)
        mine = (rank[None, :] == j[:, None]) & (j < k)[:, None]
        ids = tl.sum(tl.where(mine, e[None, :], 0), 1)
        chosen = tl.sum(tl.where(mine, p[None, :], 0.0), 1)
    else:
        for n in range(k):
            best = tl.argmax(value, 0, tie_break_left=True)
            ids = tl.where(j == n, best, ids)
            chosen = tl.where(j == n, tl.sum(tl.where(e == best, p, 0.0), 0), chosen)
            value = tl.where(e == best, -float("inf"), value)
    return ids, chosen


@triton.jit
def _route(
    x, norm, router, logits, normed, raw, ticket, eps, experts, k, layer, layers,
    forced, forced_rows, step, ids_out, weights,
    slot_of, owner, arriving, fresh, landed, a, b, decay, decays, clock, candidate_row,
    status, slots, hit, miss_count, miss_records, miss_slots, fetch_count, fetch_slots, counters, log, units,
    H: tl.constexpr, WIDE: tl.constexpr, EACH: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
    RENORMALISE: tl.constexpr, FORCED: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, KIND: tl.constexpr,
    PREFETCHED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    router_logits(x, norm, router, logits, normed, raw, eps, experts, H, WIDE, EACH, True)
    if last_arriver(ticket):
        value, p = probabilities(logits, experts, EP)
        j = tl.arange(0, KP)
        if FORCED:
            row = (tl.maximum(tl.load(step) - 1, 0) % forced_rows) * layers + layer
            ids = tl.load(forced + row * k + j, mask=j < k, other=0).to(tl.int32)
            e = tl.arange(0, EP)
            chosen = tl.sum(tl.where(e[None, :] == ids[:, None], p[None, :], 0.0), 1)
            chosen = tl.where(j < k, chosen, 0.0)
        else:
            ids, chosen = most_likely(value, p, k, EP, KP)
        if RENORMALISE:
            chosen = chosen / tl.sum(chosen, 0)
        tl.store(ids_out + j, ids, mask=j < k)
        tl.store(weights + j, chosen, mask=j < k)
        resolve(ids, k, layer, layer * experts, slot_of, owner, arriving, fresh, landed, a, b, decay, decays, clock,
                candidate_row, status, slots, hit, miss_count, miss_records, miss_slots, fetch_count, fetch_slots,
                counters, log, units, KP, C, CP, KIND, PREFETCHED)  # fmt: skip


@triton.jit
def _predict(
    x, norm, router, logits, ticket, eps, experts, k, layer, layers, least, most,
    emulated, emulated_rows, step, M: tl.constexpr,
    slot_of, owner, arriving, fresh, landed, candidate_row, held, held_count, status,
    fetch_count, fetch_records, fetch_slots, counters, units,
    H: tl.constexpr, WIDE: tl.constexpr, EACH: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
    EMULATED: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    router_logits(x, norm, router, logits, x, None, eps, experts, H, WIDE, EACH, False)
    if last_arriver(ticket):
        j = tl.arange(0, KP)
        if EMULATED:
            row = (tl.maximum(tl.load(step) - 1, 0) % emulated_rows) * layers + layer
            ids = tl.load(emulated + row * M + j, mask=j < M, other=-1).to(tl.int32)
            likely = ids >= 0
        else:
            value, p = probabilities(logits, experts, EP)
            ids, chosen = most_likely(value, p, k, EP, KP)
            likely = (j < k) & (chosen >= least)
        prefetch(ids, likely, layer * experts, slot_of, owner, arriving, fresh, landed, candidate_row, held, held_count,
                 status, fetch_count, fetch_records, fetch_slots, counters, most, units, KP, C, CP, HELD)  # fmt: skip


def route(
    x: Tensor, norm: Tensor, eps: float, router: Tensor, table: Table, layer: int, *,
    layers: int, top_k: int, renormalise: bool, logits: Tensor, normed: Tensor, ticket: Tensor,
    ids: Tensor, weights: Tensor, slots: Tensor, hit: Tensor,
    miss_count: Tensor, miss_records: Tensor, miss_slots: Tensor,
    status: Tensor, counters: Tensor, log: Tensor, step: Tensor,
    units: int = 0, forced: Tensor | None = None,
    fetched: tuple[Tensor, Tensor] | None = None, raw: Tensor | None = None, pdl: bool = False,
) -> None:  # fmt: skip
    """x [H] float32 → normed [H], ids, weights (float32), slots, hit [k], and the missing records with their slots.

    router [E, H] in a float type. hit: 1 where the record can be read at once; those that are missing must be paged in
    and those that are late waited for. `forced` [steps, layers, k] int16: ids to take in place of the router's, the
    row by `step` [1], which counts from 1. `fetched`: count [1] and
    slots of what `predict` fetched for this layer. `raw` [H]: x as it is. `units`: a record's bytes ÷ 16, for the counters. While status [1] is not 0 nothing is changed and nothing missing.
    """
    experts, h = router.shape
    assert router.is_contiguous() and x.numel() == h
    _route[(triton.cdiv(experts, EACH),)](
        x, norm, router, logits, normed, raw, ticket, eps, experts, top_k, layer, layers,
        forced, 1 if forced is None else forced.shape[0], step, ids, weights,
        table.slot_of, table.owner, table.arriving, table.fresh, table.landed, table.a, table.b,
        table.decay, table.decay.numel(), table.clock, candidate_row(table, layer),
        status, slots, hit, miss_count, miss_records, miss_slots, *(fetched or (None, None)), counters, log, units,
        H=h, WIDE=triton.next_power_of_2(h), EACH=EACH, EP=triton.next_power_of_2(experts),
        KP=triton.next_power_of_2(top_k), RENORMALISE=renormalise, FORCED=forced is not None,
        C=table.candidates.shape[1], CP=triton.next_power_of_2(table.candidates.shape[1]), KIND=KINDS[table.kind],
        PREFETCHED=fetched is not None, num_warps=4, enable_fp_fusion=False, **dependent(pdl),
    )  # fmt: skip


def predict(
    x: Tensor, norm: Tensor, eps: float, router: Tensor, table: Table, layer: int, *,
    layers: int, top_k: int, least: float, most: int, logits: Tensor, ticket: Tensor, held: Tensor,
    fetch_count: Tensor, fetch_records: Tensor, fetch_slots: Tensor, status: Tensor, counters: Tensor, step: Tensor,
    units: int = 0, emulated: Tensor | None = None, pdl: bool = False,
) -> None:  # fmt: skip
    """Gate-ahead: the norm and router of `layer` on the residual stream of an earlier one.

    Those of its top-k with a probability of at least `least` that lie in no slot take slots, at most `most`, and are
    to be fetched. `held` [n] int32 slots do not leave for them. `emulated` [steps, layers, m] int16, −1 padded: what
    is predicted instead.
    """
    experts, h = router.shape
    m = 1 if emulated is None else emulated.shape[2]
    _predict[(triton.cdiv(experts, EACH),)](
        x, norm, router, logits, ticket, eps, experts, top_k, layer, layers, least, most,
        emulated, 1 if emulated is None else emulated.shape[0], step, m,
        table.slot_of, table.owner, table.arriving, table.fresh, table.landed, candidate_row(table, layer),
        held, held.numel(), status, fetch_count, fetch_records, fetch_slots, counters, units,
        H=h, WIDE=triton.next_power_of_2(h), EACH=EACH, EP=triton.next_power_of_2(experts),
        KP=triton.next_power_of_2(max(top_k, m)), EMULATED=emulated is not None,
        C=table.candidates.shape[1], CP=triton.next_power_of_2(table.candidates.shape[1]),
        HELD=triton.next_power_of_2(held.numel()), num_warps=4, **dependent(pdl),
    )  # fmt: skip


def candidate_row(table: Table, layer: int) -> Tensor:
    return table.candidates[layer if len(table.candidates) > 1 else 0]
