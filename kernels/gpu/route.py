"""RMS norm, router, top-k and residency in one launch; and the same some layers ahead, to predict.

Each of up to PROGRAMS programs computes some of the router's logits; the last to finish reads all of them and decides.
The launch is on the critical path between attention and the experts of every layer, so it reads early what it can:
weights before the preceding kernel has ended, the table before the logits are complete.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.rank import MIXER, SOFTMAX, enough, judged, mixed, places, ranked, steps
from offmoe.kernels.gpu.resolve import KINDS, look, prefetch, resolve
from offmoe.kernels.gpu.table import Table
from offmoe.kernels.route import TINY, Rule

PROGRAMS = 128  # at most
LEAST = tl.constexpr(TINY)


@triton.jit
def router_logits(
    x, weight, gain, shift, offset, logits, normed, raw, eps, rows, H: tl.constexpr, WIDE: tl.constexpr,
    EACH: tl.constexpr, APART: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Store the logits of the program's rows, whose weights are [EACH, WIDE]; program 0 stores the normed x and raw x.

    APART: the gain applies to the experts' input only, not to the router's.
    """
    i = tl.arange(0, WIDE)
    inside = i < H
    value = tl.load(x + i, mask=inside, other=0.0)
    y = value
    if shift is not None:
        y = tl.where(inside, value - tl.sum(value, 0) / H, 0.0)
    scale = tl.rsqrt(tl.sum(y * y, 0) / H + eps)
    if APART:
        dot = tl.sum(weight.to(tl.float32) * y[None, :], 1) * scale
        y = y * gain * scale
    else:
        y = y * gain
        dot = tl.sum(weight.to(tl.float32) * y[None, :], 1) * scale
        y = y * scale
    if shift is not None:
        bias = tl.load(shift + i, mask=inside, other=0.0)
        dot += tl.sum(weight.to(tl.float32) * bias[None, :], 1)
        y += bias
    row = tl.program_id(0) * EACH + tl.arange(0, EACH)
    if offset is not None:
        dot += tl.load(offset + row, mask=row < rows, other=0.0)
    tl.store(logits + row, dot, mask=row < rows)
    if WRITE and tl.program_id(0) == 0:
        tl.store(normed + i, y, mask=inside)
        if raw is not None:
            tl.store(raw + i, value, mask=inside)


@triton.jit
def router_weights(router, norm, rows, H: tl.constexpr, WIDE: tl.constexpr, EACH: tl.constexpr):
    """Load the program's rows of the router [EACH, WIDE] and the norm's weights [WIDE]."""
    i = tl.arange(0, WIDE)
    row = tl.program_id(0) * EACH + tl.arange(0, EACH)
    there = (row < rows)[:, None] & (i < H)[None, :]
    weight = tl.load(router + row[:, None] * H + i[None, :], mask=there, other=0.0)
    return weight, tl.load(norm + i, mask=i < H, other=0.0)


@triton.jit
def last_arriver(ticket):
    """Return True in the program that finishes last, and reset the ticket to 0."""
    tl.debug_barrier()  # all threads' stores come before the ticket
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit(
    do_not_specialize=["layer", "units"],
    do_not_specialize_on_alignment=[
        "candidate_row",
        "fetch_count",
        "fetch_slots",
        "norm",
        "shift",
        "router",
        "bias",
        "offset",
        "factors",
    ],
)
def _route(
    x, norm, shift, router, offset, bias, factors, logits, normed, raw, ticket, eps, experts, k: tl.constexpr, top_p,
    scale,
    jitter, layer, layers, forced, forced_rows, step, ids, weights,
    slot_of, owner, arriving, fresh, landed, a, b, decay, decays, clock, candidate_row,
    status, slots, hit, miss_count, miss_records, miss_slots, fetch_count, fetch_slots, counters, log, units,
    H: tl.constexpr, WIDE: tl.constexpr, EACH: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
    SCORES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, GP: tl.constexpr,
    VARIES: tl.constexpr, APART: tl.constexpr, RENORMALISE: tl.constexpr, SHARED: tl.constexpr, FORCED: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr, KIND: tl.constexpr, USE: tl.constexpr, PREFETCHED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = experts + SHARED
    weight, gain = router_weights(router, norm, rows, H, WIDE, EACH)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seen = look(layer * experts, experts, slot_of, owner, arriving, fresh, landed, a, b, decay, decays, clock,
                candidate_row, fetch_count, fetch_slots, counters, status, EP, C, CP, KP, KIND, USE,
                PREFETCHED)  # fmt: skip
    j = tl.arange(0, KP)
    if FORCED:
        row = (tl.maximum(tl.load(step) - 1, 0) % forced_rows) * layers + layer
        given = tl.load(forced + row * k + j, mask=j < k, other=-1).to(tl.int32)
    router_logits(x, weight, gain, shift, offset, logits, normed, raw, eps, rows, H, WIDE, EACH, APART, True)
    if last_arriver(ticket):
        order, score = judged(logits, bias, experts, EP, SCORES, GROUPS, KEPT, BEST, GP)
        rank = ranked(order, experts, k, EP)
        if FORCED:  # the ranking costs what it costs without: what is never true is not known to be
            rank = tl.where(tl.min(rank, 0) < 0, rank, places(given, EP, KP))
        chosen = k
        if VARIES:
            chosen = tl.sum((given >= 0).to(tl.int32), 0) if FORCED else enough(score, rank, top_p, k, EP, SCORES)
            tl.store(ids + j, j * 0 - 1, mask=(j >= chosen) & (j < k))
            tl.store(weights + j, j * 0.0, mask=(j >= chosen) & (j < k))
        asked = rank < chosen
        if SCORES == MIXER:
            score = mixed(order, rank, experts, jitter, k, EP)
        elif RENORMALISE:
            score = score / (tl.sum(tl.where(asked, score, 0.0), 0) + LEAST)
        elif SCORES == SOFTMAX:
            score = score / tl.sum(score, 0)
        if factors is not None:
            score = score * tl.load(factors + tl.arange(0, EP), mask=tl.arange(0, EP) < experts, other=0.0)
        tl.store(ids + rank, tl.arange(0, EP), mask=asked)
        tl.store(weights + rank, score * scale, mask=asked)
        if SHARED:
            tl.store(weights + k, tl.sigmoid(tl.load(logits + experts, cache_modifier=".cg")))
        resolve(seen, rank, chosen, k, layer, layer * experts, slot_of, owner, arriving, fresh, a, b, clock,
                slots, hit, miss_count, miss_records, miss_slots, counters, log, units, EP, CP, KP, KIND,
                PREFETCHED, VARIES)  # fmt: skip


@triton.jit(
    do_not_specialize=["layer", "units", "most"],
    do_not_specialize_on_alignment=[
        "candidate_row",
        "fetch_count",
        "fetch_records",
        "fetch_slots",
        "norm",
        "shift",
        "router",
        "bias",
        "offset",
    ],
)
def _predict(
    x, norm, shift, router, offset, bias, logits, ticket, eps, experts, k: tl.constexpr, top_p, layer, layers, least,
    most,
    emulated, emulated_rows, step, M: tl.constexpr,
    slot_of, owner, arriving, fresh, landed, candidate_row, held, held_count, status,
    fetch_count, fetch_records, fetch_slots, counters, units,
    H: tl.constexpr, WIDE: tl.constexpr, EACH: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
    SCORES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, GP: tl.constexpr,
    VARIES: tl.constexpr, APART: tl.constexpr, EMULATED: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    HELD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    weight, gain = router_weights(router, norm, experts, H, WIDE, EACH)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    router_logits(x, weight, gain, shift, offset, logits, x, None, eps, experts, H, WIDE, EACH, APART, False)
    if last_arriver(ticket):
        j = tl.arange(0, KP)
        if EMULATED:
            row = (tl.maximum(tl.load(step) - 1, 0) % emulated_rows) * layers + layer
            ids = tl.load(emulated + row * M + j, mask=j < M, other=-1).to(tl.int32)
            likely = ids >= 0
        else:
            order, score = judged(logits, bias, experts, EP, SCORES, GROUPS, KEPT, BEST, GP)
            rank = ranked(order, experts, k, EP)
            chosen = rank[:, None] == j[None, :]
            ids = tl.sum(tl.where(chosen, tl.arange(0, EP)[:, None], 0), 0)
            p = tl.sum(tl.where(chosen, score[:, None], 0.0), 0)
            if SCORES <= MIXER:
                p = p / tl.sum(score, 0)
            likely = (j < k) & (p >= least)
            if VARIES:
                likely &= j < enough(score, rank, top_p, k, EP, SCORES)
        prefetch(ids, likely, layer * experts, slot_of, owner, arriving, fresh, landed, candidate_row, held, held_count,
                 status, fetch_count, fetch_records, fetch_slots, counters, most, units, KP, C, CP, HELD)  # fmt: skip


def route(
    x: Tensor, norm: Tensor, eps: float, router: Tensor, table: Table, layer: int, *,
    layers: int, rule: Rule, logits: Tensor, normed: Tensor, ticket: Tensor,
    ids: Tensor, weights: Tensor, slots: Tensor, hit: Tensor,
    miss_count: Tensor, miss_records: Tensor, miss_slots: Tensor,
    status: Tensor, counters: Tensor, log: Tensor, step: Tensor,
    units: int = 0, forced: Tensor | None = None,
    fetched: tuple[Tensor, Tensor] | None = None, raw: Tensor | None = None, bias: Tensor | None = None,
    shift: Tensor | None = None, offset: Tensor | None = None, factors: Tensor | None = None, apart: bool = False,
    pdl: bool = False,
) -> None:  # fmt: skip
    """Norm x [H] float32 and route it: write normed [H], ids, weights (float32), slots, hit [k], and the list of
    misses.

    router [E, H] in a float type; for a gated shared expert it has one more row, whose logit's sigmoid becomes
    weights[k]. `logits` is as long as the router. `bias` [E] float32 for rule.biased, `factors` [E] float32 for
    rule.scaled. `shift` [H] float32: the norm is a LayerNorm with this bias. `apart`: the norm's weights are for the
    experts only, the router takes x normed without them. `offset` float32, as long as the router, is added to the
    logits.

    hit is 1 where the record can be read at once; missing records must be paged in, late ones waited for. `forced`
    [steps, layers, k] int16 replaces the router's ids (-1, with top-p: none); its row is chosen by `step` [1], which
    counts from 1. `fetched`: count [1] and slots of what `predict` fetched for this layer. `raw` [H] receives x.
    `units`: a record's bytes / 16, for the counters. While status [1] is not 0 the table does not change and nothing is
    missing.
    """
    experts = table.slot_of.numel() // layers
    assert router.is_contiguous()
    assert x.numel() == router.shape[1]
    assert rule.biased == (bias is not None)
    assert rule.scaled == (factors is not None)
    assert offset is None or len(offset) == len(router)
    _route[(triton.cdiv(len(router), each(experts)),)](
        x, norm, shift, router, offset, bias, factors, logits, normed, raw, ticket, eps, experts, rule.top_k,
        rule.top_p,
        rule.scale, rule.jitter, layer, layers, forced, 1 if forced is None else forced.shape[0], step, ids, weights,
        table.slot_of, table.owner, table.arriving, table.fresh, table.landed, table.a, table.b,
        table.decay, table.decay.numel(), table.clock, table.candidate_row(layer),
        status, slots, hit, miss_count, miss_records, miss_slots, *(fetched or (None, None)), counters, log, units,
        KP=triton.next_power_of_2(rule.top_k), RENORMALISE=rule.renormalise, SHARED=len(router) - experts,
        FORCED=forced is not None, APART=apart, **steps(rule),
        C=table.candidates.shape[1], CP=triton.next_power_of_2(table.candidates.shape[1]), KIND=KINDS[table.kind],
        USE=table.use, PREFETCHED=fetched is not None, enable_fp_fusion=False, **sizes(router, experts),
        **dependent(pdl),
    )  # fmt: skip


def predict(
    x: Tensor, norm: Tensor, eps: float, router: Tensor, table: Table, layer: int, *,
    layers: int, rule: Rule, least: float, most: int, logits: Tensor, ticket: Tensor, held: Tensor,
    fetch_count: Tensor, fetch_records: Tensor, fetch_slots: Tensor, status: Tensor, counters: Tensor, step: Tensor,
    units: int = 0, emulated: Tensor | None = None, bias: Tensor | None = None, shift: Tensor | None = None,
    offset: Tensor | None = None, apart: bool = False, pdl: bool = False,
) -> None:  # fmt: skip
    """Predict the experts of `layer` by its norm and router on the residual stream of an earlier layer (gate-ahead).

    Of its top-k, records with a score (a probability for a softmax) of at least `least` that are absent are admitted,
    at most `most`, and listed to be fetched. The slots `held` [n] int32 are not evicted for them. `emulated` [steps,
    layers, m] int16, -1 padded, replaces the prediction.
    """
    experts = table.slot_of.numel() // layers
    m = 1 if emulated is None else emulated.shape[2]
    _predict[(triton.cdiv(experts, each(experts)),)](
        x, norm, shift, router, offset, bias, logits, ticket, eps, experts, rule.top_k, rule.top_p, layer, layers,
        least, most,
        emulated, 1 if emulated is None else emulated.shape[0], step, m,
        table.slot_of, table.owner, table.arriving, table.fresh, table.landed, table.candidate_row(layer),
        held, held.numel(), status, fetch_count, fetch_records, fetch_slots, counters, units,
        KP=triton.next_power_of_2(max(rule.top_k, m)), EMULATED=emulated is not None, APART=apart, **steps(rule),
        C=table.candidates.shape[1], CP=triton.next_power_of_2(table.candidates.shape[1]),
        HELD=triton.next_power_of_2(held.numel()), **sizes(router, experts), **dependent(pdl),
    )  # fmt: skip


def each(experts: int) -> int:
    """Return the experts per program: about a hundred programs on a GPU, so that each reads little; 2 in the
    interpreter.
    """
    return max(1, triton.next_power_of_2(experts) // (PROGRAMS if isinstance(_route, triton.JITFunction) else 2))


def sizes(router: Tensor, experts: int) -> dict[str, int]:
    """Return the launch's sizes for a router [E, H]."""
    h = router.shape[1]
    wide = triton.next_power_of_2(h)
    warps = 8 if wide * each(experts) > 4096 else 4
    return {"H": h, "WIDE": wide, "EACH": each(experts), "EP": triton.next_power_of_2(experts), "num_warps": warps}
