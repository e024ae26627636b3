"""Experts of one to eight tokens, read from their slots; missing records are multiplied while they are copied.

There is one launch for gate and up, one for down. The rows of the first are divided among all programs that run at
once; while records are missing, the first programs are movers (movers.py), which copy a few rows of a record out of
pinned memory and multiply them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.feed_forward import SILU, Glu
from offmoe.kernels.gpu.formats.dot import SHARING, UNIT, fold, x_of
from offmoe.kernels.gpu.formats.grids import grids_for
from offmoe.kernels.gpu.gemv import FEWER_WARPS, WARPS, across, planes, programs, rows_of, stream, tile
from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.movers import bring_rows, chunk_of, movers_of, moving_of
from offmoe.kernels.gpu.norm_rope import clipped
from offmoe.kernels.gpu.page_in import Copies, bring, scratch_for, source_of
from offmoe.kernels.gpu.striped import striped_index
from offmoe.kernels.planes import SlotLayout

# Their gate and up take 158 to 168 registers.
HEAVY = {"Q3_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F8_E4M3", "F8_E4M3_BF16", "F8_E4M3_ROW", "NVFP4", "IQ3_XXS",
         "IQ3_S"}  # fmt: skip


@triton.jit
def pair_of(pid, programs, slots, weights, ids, targets, missing, pairs, PP: tl.constexpr,
            LISTED: tl.constexpr, KP: tl.constexpr):  # fmt: skip
    """Return the program's (pair, slot, weight, expert, programs that share the pair, index among them); pair -1: none.

    Pairs whose slots are among the first `missing` targets are left to the movers. All loads are issued at once:
    dependent loads cost 1 µs each.
    """
    if targets is None:
        each = programs // pairs
        pair = tl.where(pid // each < pairs, pid // each, -1)
        at = tl.maximum(pair, 0)
        expert, slot = 0 if ids is None else tl.load(ids + at), tl.load(slots + at)
        return tl.where(slot >= 0, pair, -1), slot, tl.load(weights + at), expert, each, pid % each
    else:
        j, c = tl.arange(0, PP), tl.arange(0, KP)
        there = j < pairs
        slot, weight = tl.load(slots + j, mask=there, other=-1), tl.load(weights + j, mask=there, other=0.0)
        expert = tl.zeros((PP,), tl.int32) if ids is None else tl.load(ids + j, mask=there, other=0)
        target = tl.load(targets + c, mask=c < LISTED, other=-1)
        absent = (target[None, :] == slot[:, None]) & (c < missing)[None, :]
        chosen = ((slot >= 0) & (tl.sum(absent.to(tl.int32), 1) == 0)).to(tl.int32)
        each = programs // tl.maximum(tl.sum(chosen, 0), 1)
        mine = (chosen != 0) & (tl.cumsum(chosen, 0) - 1 == pid // each)
        pair = tl.sum(tl.where(mine, j + 1, 0), 0) - 1
        slot, weight = tl.sum(tl.where(mine, slot, 0), 0), tl.sum(tl.where(mine, weight, 0.0), 0)
        return pair, slot, weight, tl.sum(tl.where(mine, expert, 0), 0), each, pid % each


@triton.jit
def glu(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PLUS: tl.constexpr, CUBIC: tl.constexpr):
    """Compute kernels.feed_forward.Glu; NaN stays NaN."""
    if LIMIT > 0:
        gate, up = tl.where(gate > LIMIT, LIMIT, gate), clipped(up, LIMIT)
    slope = gate if CUBIC == 0 else gate + CUBIC * gate * gate * gate
    slope = slope if ALPHA == 1 else slope * ALPHA
    return gate * tl.sigmoid(slope) * (up if PLUS == 0 else up + PLUS)


@triton.jit
def gate_up_rows(
    record, weight, bias, x, out, first, end, grids, H: tl.constexpr, INNER: tl.constexpr, R: tl.constexpr,
    PITCH: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PLUS: tl.constexpr, CUBIC: tl.constexpr,
    BEFORE: tl.constexpr,
    FG: tl.constexpr, UG: tl.constexpr, WG: tl.constexpr,
    G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, G3: tl.constexpr,
    FU: tl.constexpr, UU: tl.constexpr, WU: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, U3: tl.constexpr,
):  # fmt: skip
    """Compute rows first … end of one pair; consecutive rows are PITCH rows apart; bias [2, INNER] or None."""
    ROW_G: tl.constexpr = H // WG * PITCH
    ROW_U: tl.constexpr = H // WU * PITCH
    r, g, u = tl.arange(0, R), tl.arange(0, UG), tl.arange(0, UU)
    there_g, there_u = g < H // WG, u < H // WU
    none_g, none_u = tl.zeros((UG,), tl.int32), tl.zeros((UU,), tl.int32)
    xg = x_of(x, x, none_g, g * WG, there_g, FG, H, False, grids)
    xu = xg
    if FU != FG:
        xu = x_of(x, x, none_u, u * WU, there_u, FU, H, False, grids)
    row = first + r
    gates = rows_of(record, none_g, g, there_g, row, end, ROW_G, FG, G0, G1, G2, G3)
    ups = rows_of(record, none_u, u, there_u, row, end, ROW_U, FU, U0, U1, U2, U3)
    for start in range(first, end, R):
        row, ahead = start + r, start + R + r
        next_gates = rows_of(record, none_g, g, there_g, ahead, end, ROW_G, FG, G0, G1, G2, G3)
        next_ups = rows_of(record, none_u, u, there_u, ahead, end, ROW_U, FU, U0, U1, U2, U3)
        gate, up = fold(gates, xg, FG), fold(ups, xu, FU)
        if bias is not None:
            gate += tl.load(bias + row, mask=row < end, other=0.0)
            up += tl.load(bias + INNER + row, mask=row < end, other=0.0)
        if BEFORE:
            gate, up, after = gate * weight, up * weight, 1.0
        else:
            after = weight
        tl.store(out + striped_index(row, INNER), glu(gate, up, ALPHA, LIMIT, PLUS, CUBIC) * after, mask=row < end)
        gates, ups = next_gates, next_ups


@triton.jit
def _gate_up(
    records, stride, slots, weights, ids, bias, x, out, k, pairs,
    sources, numbers, base, row_stride, count, targets, scratch, grids,
    MOVERS: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, DOWN: tl.constexpr,
    CHUNK: tl.constexpr, LISTED: tl.constexpr, KP: tl.constexpr,
    H: tl.constexpr, INNER: tl.constexpr, PP: tl.constexpr, R: tl.constexpr,
    PITCH: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PLUS: tl.constexpr, CUBIC: tl.constexpr,
    BEFORE: tl.constexpr,
    FG: tl.constexpr, UG: tl.constexpr, WG: tl.constexpr,
    G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, G3: tl.constexpr,
    FU: tl.constexpr, UU: tl.constexpr, WU: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, U3: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """While records are missing, the first MOVERS programs, which start first, copy them and multiply ROWS rows at a
    time.

    The other programs are divided among the pairs that are resident.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # only now: _down reads the slots before it waits
    pid, movers, missing = tl.program_id(0), 0, 0
    if MOVERS > 0:
        missing = tl.load(count)
        movers = tl.where(missing > 0, MOVERS, 0)
    moves = pid < movers
    pair, slot, weight, expert, sharing, which = pair_of(
        pid - movers, tl.num_programs(0) - movers, slots, weights, ids, targets, missing, pairs, PP, LISTED, KP
    )
    each = tl.cdiv(tl.cdiv(INNER, R), sharing) * R
    first, end = which * each, tl.minimum(which * each + each, INNER)
    TURNS: tl.constexpr = triton.cdiv(INNER, ROWS)  # of a record
    turns = tl.where(moves, missing * TURNS, (pair >= 0).to(tl.int32))
    for now in range(tl.where(moves, pid, 0), turns, tl.where(moves, MOVERS, 1)):
        if MOVERS > 0:
            if moves:
                i, j = now // TURNS, tl.arange(0, PP)
                slot = tl.load(targets + i)
                mine = (j < pairs) & (tl.load(slots + j, mask=j < pairs, other=-1) == slot)
                pair = tl.sum(tl.where(mine, j, 0), 0)
                weight = tl.load(weights + pair)
                if ids is not None:
                    expert = tl.load(ids + pair)
                first = now % TURNS * ROWS
                end = tl.minimum(first + ROWS, INNER)
                source = source_of(sources, numbers, base, row_stride, i)
                bring_rows(source, records + slot.to(tl.int64) * stride, scratch + pid * CHUNK, first, end, ROWS,
                           INNER, STRIPS, TILES, CHUNK)  # fmt: skip
        record = records + slot.to(tl.int64) * stride
        gate_up_rows(record, weight, None if bias is None else bias + expert * (2 * INNER), x + (pair // k) * H,
                     out + pair * INNER, first, end, grids, H, INNER, R, PITCH, ALPHA, LIMIT, PLUS, CUBIC, BEFORE,
                     FG, UG, WG, G0, G1, G2, G3, FU, UU, WU, U0, U1, U2, U3)  # fmt: skip
    if MOVERS > 0:
        if moves:
            bring(pid, MOVERS, sources, numbers, base, row_stride, count, targets, scratch, records, stride, None, None,
                  DOWN, CHUNK, False)  # fmt: skip


def expert_gate_up(
    records: Tensor, layout: SlotLayout, slots: Tensor, weights: Tensor, x: Tensor, out: Tensor, *,
    copies: Copies | None = None, glu: Glu = SILU, ids: Tensor | None = None, bias: Tensor | None = None,
    before: bool = False, pdl: bool = False,
) -> None:  # fmt: skip
    """Compute weight · glu(gate x, up x) of every (token, expert) pair into out [P, F], striped.

    records [S, stride] uint8, slots [P] int32, weights [P] float32, x [T, H] striped. `bias` [E, 2F] float32 holds
    gate's and up's biases concatenated; `ids` [P] int32 are the experts. Pair p belongs to token p // (P / T); nothing
    is computed for a pair in slot -1, here or by expert_down. With `copies`, for one token: its missing records are
    copied into their slots and multiplied as they arrive. `before`: glu(weight · gate x, weight · up x) instead.
    """
    assert x.is_contiguous() and out.is_contiguous() and records.stride(1) == 1
    assert copies is None or len(x) == 1
    gate, up, h, pairs = layout.gate, layout.up, x.shape[1], len(slots)
    (ug, _), (uu, _) = across(gate.format, h), across(up.format, h)
    warps, heavy, most = sharing_of(layout, x.device)
    moving = moving_of(copies, records, layout, warps, most)
    _gate_up[(max(most, pairs + moving["MOVERS"]),)](
        records, records.stride(0), slots, weights, ids, bias, x, out, pairs // len(x), pairs,
        *(copies.arguments if copies else [None] * 7), grids_for(x.device, gate.format, up.format), **moving,
        H=h, INNER=gate.rows, PP=triton.next_power_of_2(pairs), R=tile(), PITCH=gate.pitch,
        ALPHA=glu.alpha, LIMIT=glu.limit, PLUS=glu.plus, CUBIC=glu.cubic, BEFORE=before,
        FG=gate.format, UG=ug, WG=UNIT[gate.format], **planes("G", gate),
        FU=up.format, UU=uu, WU=UNIT[up.format], **planes("U", up), num_warps=warps,
        maxnreg=registers(max(warps, FEWER_WARPS if heavy else WARPS)), **dependent(pdl),
    )  # fmt: skip


def registers(warps: int) -> int:
    """Return the registers per thread at which `warps` warps run at once.

    Movers would need 30 more: what they keep besides their rows is on the stack, and is read once for every few rows.
    """
    return 65536 // (32 * warps) // 8 * 8


def sharing_of(layout: SlotLayout, device: torch.device) -> tuple[int, bool, int]:
    """Return (warps per program, whether many registers are needed, programs at once) of a gate-and-up launch."""
    forms = layout.gate, layout.up
    warps, heavy = max(across(form.format, form.cols)[1] for form in forms), any(form.format in HEAVY for form in forms)
    return warps, heavy, programs(device, warps, heavy)


def movers_scratch(layouts: Iterable[SlotLayout], device: torch.device) -> Tensor:
    """Return a `Copies.scratch` that is large enough for expert_gate_up with any of `layouts`."""
    launches = ((warps, most) for warps, _, most in (sharing_of(layout, device) for layout in layouts))
    return scratch_for(device, max(movers_of(most) * chunk_of(warps) for warps, most in launches))


@triton.jit
def _down(
    records, stride, slots, ids, weights, bias, count, inner, x, each, grids,
    K: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
    FORMAT: tl.constexpr, WIDTH: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, KP: tl.constexpr, LATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs, tokens): the K experts of a token as one long row.

    Slots were written before the preceding launch, and so were the records if nothing was missing: then the first rows
    are loaded while it runs. LATE: 0 never wait, 1 wait if something was missing, 2 always (Triton 3.6 does not compile
    the choice where units share scales).
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    UNITS: tl.constexpr = INNER // WIDTH
    t, u = tl.program_id(1), tl.arange(0, U)
    pair, unit, there = t * K + u // UNITS, u % UNITS, u < K * UNITS
    slot = tl.load(slots + pair, mask=there, other=-1).to(tl.int64)
    origin, there = tl.maximum(slot, 0) * (stride // 4), slot >= 0
    first = tl.program_id(0) * each
    end = tl.minimum(first + each, H)
    rows = first + tl.arange(0, R)
    missing = 0 if count is None else tl.load(count)
    if LATE < 2:
        words = rows_of(records, origin, unit, there & (missing == 0), rows, end, UNITS, FORMAT, P0, P1, P2, P3)
    j = tl.arange(0, KP)
    chosen = None if bias is None else tl.maximum(tl.load(ids + t * K + j, mask=j < K, other=0), 0)
    shares = None if bias is None else tl.load(weights + t * K + j, mask=j < K, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if LATE == 1:
        if missing > 0:  # movers bring down last: it is whole only now
            words = rows_of(records, origin, unit, there, rows, end, UNITS, FORMAT, P0, P1, P2, P3)
    elif LATE == 2:
        words = rows_of(records, origin, unit, there, rows, end, UNITS, FORMAT, P0, P1, P2, P3)
    xs = x_of(inner, inner, pair * INNER, unit * WIDTH, there, FORMAT, INNER, False, grids)
    stream(records, origin, unit, there, words, xs, first, end, x + t * H, bias, chosen, shares, 0, 1.0, UNITS, R, H,
           True, 0, FORMAT, P0, P1, P2, P3)  # fmt: skip


def expert_down(
    records: Tensor, layout: SlotLayout, slots: Tensor, inner: Tensor, x: Tensor, *,
    ids: Tensor | None = None, weights: Tensor | None = None, bias: Tensor | None = None,
    count: Tensor | None = None, pdl: bool = False,
) -> None:  # fmt: skip
    """Add Σ_j down_j inner[t, j] to x [T, H], summed in float32 in one fixed order; `inner` is weighted already.

    records [S, stride] uint8, slots [T · k] int32, inner [T · k, F] and x float32, striped. `bias` [E, H] float32 of
    experts `ids` [T · k] int32 is added, times `weights` [T · k] float32. `count` [1] int32: count of the preceding
    launch's `Copies`, if it had any.
    """
    assert x.is_contiguous() and inner.is_contiguous() and records.stride(1) == 1
    down, k, rows = layout.down, len(slots) // len(x), tile()
    units, warps = across(down.format, k * down.cols)
    each = rows * triton.cdiv(down.rows * len(x), rows * programs(x.device, warps))
    _down[(triton.cdiv(down.rows, each), len(x))](
        records, records.stride(0), slots, ids, weights, bias, count, inner, x, each,
        grids_for(x.device, down.format), K=k, H=down.rows, INNER=down.cols,
        R=rows, U=units, FORMAT=down.format, WIDTH=UNIT[down.format], **planes("P", down),
        KP=triton.next_power_of_2(k), LATE=0 if count is None else 2 if down.format in SHARING else 1,
        num_warps=warps, maxnreg=registers(max(warps, WARPS)), **dependent(pdl),
    )  # fmt: skip
