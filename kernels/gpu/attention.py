"""Attention of one token over the KV cache in one launch (split-KV); for a prompt's chunk see prefill.py.

The kernel is launched with the same arguments for every length: the length is a tensor on the device, and each KV
head's positions are divided among `splits` programs there. What it reads before it waits for the preceding kernel
(position, rope row, norm weights, old keys and values) was written by an earlier graph launch: one graph holds one
token.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.norm_rope import clipped, full_factor, in_int8, norm_factor, norm_kind
from offmoe.kernels.gpu.striped import striped_index

LEAST = 256  # positions that are not worth dividing: joining partial results costs 2 µs
COMBINE = 8192  # values that the last program reads at once: query heads times splits times a head's width
SOON = tl.constexpr(LEAST)  # positions that L2 is asked for
LOG2E = 1.4426950408889634
LOG_2_E = tl.constexpr(LOG2E)


@triton.jit
def oldest_seen(here, WINDOW: tl.constexpr, CHUNKED: tl.constexpr):
    """Return the first position that a query at `here` sees."""
    if WINDOW == 0:
        return here * 0
    elif CHUNKED:
        return here // WINDOW * WINDOW
    else:
        return tl.maximum(here - (WINDOW - 1), 0)


@triton.jit
def around(start, room, COUNT: tl.constexpr, RING: tl.constexpr):
    """Return the cache rows of positions start … start + COUNT; a ring of at least COUNT rows wraps around."""
    if RING:
        n = start % room + tl.arange(0, COUNT)
        n = tl.where(n >= room, n - room, n)
    else:
        n = start + tl.arange(0, COUNT)
    return n


@triton.jit
def load_block(base, scales, start, end, room, D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
               INT8: tl.constexpr, RING: tl.constexpr):  # fmt: skip
    """Load positions start … of one head [BLOCK, WIDE], 0 from `end` on, and their scales [BLOCK]."""
    n, d = around(start, room, BLOCK, RING), tl.arange(0, WIDE)
    there = start + tl.arange(0, BLOCK) < end
    block = tl.load(base + n[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0)
    scale = tl.load(scales + n, mask=there, other=0.0).to(tl.float32) if INT8 else tl.full((BLOCK,), 1.0, tl.float32)
    return block, scale


@triton.jit
def fold(q, k, v, k_scale, v_scale, visible, top, total, mixed, to_log2, INT8: tl.constexpr, DOT: tl.constexpr):
    """Add one block to the running softmax: q [R, W]; k, v [B, W]; top, total [R]; mixed [R, W]."""
    scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee") * to_log2
    if INT8:
        scores = scores * k_scale[None, :]
    scores = tl.where(visible[None, :], scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    old = tl.exp2(top - higher)
    p = tl.exp2(scores - higher[:, None])
    total = total * old + tl.sum(p, 1)
    if INT8:
        p = p * v_scale[None, :]
    mixed = tl.dot(p.to(DOT), v.to(DOT), mixed * old[:, None], input_precision="ieee")
    return higher, total, mixed


@triton.jit
def partial_of(partial, stats, row, n, active, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """Load the partial results of splits n [1, MANY] for query heads `rows` [J, 1] of the group.

    Returns values [J, MANY, WIDE], top and total [J, MANY]. L1 may hold stale lines, so loads bypass it.
    """
    d, inside, at = tl.arange(0, WIDE), (n < active) & (row < GROUP), n * GROUP + row
    values = tl.load(partial + at[:, :, None] * D + d[None, None, :], mask=inside[:, :, None] & (d < D)[None, None, :],
                     other=0.0, cache_modifier=".cg")  # fmt: skip
    top = tl.load(stats + at * 2, mask=inside, other=-float("inf"), cache_modifier=".cg")
    return values, top, tl.load(stats + at * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def unjoined(J: tl.constexpr, WIDE: tl.constexpr):
    """Return the state of `joined` before any split."""
    return tl.full((J,), -float("inf"), tl.float32), tl.zeros((J,), tl.float32), tl.zeros((J, WIDE), tl.float32)


@triton.jit
def joined(top, total, result, values, tops, totals):
    """Add splits of J query heads to the running result: top, total [J], result [J, WIDE], values [J, MANY, WIDE]."""
    higher = tl.maximum(top, tl.max(tops, 1))
    old, weights = tl.exp2(top - higher), tl.exp2(tops - higher[:, None])
    total = total * old + tl.sum(weights * totals, 1)
    return higher, total, result * old[:, None] + tl.sum(values * weights[:, :, None], 1)


@triton.jit
def combine(
    partial, head, active, splits, gate, mixed,
    GROUP: tl.constexpr, D: tl.constexpr, KV_HEADS: tl.constexpr, WIDE: tl.constexpr, J: tl.constexpr,
    MANY: tl.constexpr,
):  # fmt: skip
    """Join a KV head's partial results, J query heads and MANY splits at a time, the next loads in flight meanwhile."""
    stats = partial + KV_HEADS * splits * GROUP * D + head * splits * GROUP * 2
    partial += head * splits * GROUP * D
    rounds = tl.cdiv(active, MANY)
    j, n, d = tl.arange(0, J)[:, None], tl.arange(0, MANY)[None, :], tl.arange(0, WIDE)[None, :]
    top, total, result = unjoined(J, WIDE)
    values, tops, totals = partial_of(partial, stats, j, n, active, GROUP, D, WIDE)
    for i in range(tl.cdiv(GROUP, J) * rounds):
        after = i + 1
        following, next_tops, next_totals = partial_of(
            partial, stats, after // rounds * J + j, after % rounds * MANY + n, active, GROUP, D, WIDE
        )
        top, total, result = joined(top, total, result, values, tops, totals)
        if after % rounds == 0:
            row = i // rounds * J + j
            at, inside = (head * GROUP + row) * D + d, (row < GROUP) & (d < D)
            result = result / total[:, None]
            if gate is not None:
                result = result * tl.sigmoid(tl.load(gate + at, mask=inside, other=0.0))
            tl.store(mixed + striped_index(at, KV_HEADS * GROUP * D), result, mask=inside)
            top, total, result = unjoined(J, WIDE)
        values, tops, totals = following, next_tops, next_totals


@triton.jit
def to_l2(base, start, last, room, ROW: tl.constexpr, COUNT: tl.constexpr, RING: tl.constexpr):
    """Prefetch COUNT rows of ROW bytes at `base` from row `start` into L2, none after `last`; do not wait."""
    LINES: tl.constexpr = triton.next_power_of_2((ROW + 127) // 128)
    n, line = tl.minimum(start + tl.arange(0, COUNT), last), tl.minimum(tl.arange(0, LINES) * 128, ROW - 1)
    if RING:
        n = n % room
    at = base.to(tl.int64) + n.to(tl.int64)[:, None] * ROW + line[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _decode(
    qkv, gate, keys, values, scales, position, table, temperature, q_norm, k_norm, sinks, mixed_out, partial, tickets,
    ctx, room, splits, least, clip, eps, to_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, J: tl.constexpr, MANY: tl.constexpr, STAGES: tl.constexpr,
    WINDOW: tl.constexpr, CHUNKED: tl.constexpr, RING: tl.constexpr,
    NORM: tl.constexpr, VNORM: tl.constexpr, CLIP: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, splits). The first R values of a head are rotated. Position p is stored in row p % room.

    A tile's rows are the group's query heads, their key, their value, padding. Loads are issued before the code that
    waits for any of them, all of a tile in one layout: each wait in turn costs 0.6 µs.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    head, split = tl.program_id(0), tl.program_id(1)
    here = tl.load(position).to(tl.int32)
    oldest = oldest_seen(here, WINDOW, CHUNKED)
    size = tl.maximum(least, tl.cdiv(tl.cdiv(here - oldest + 1, splits), BLOCK) * BLOCK)
    active = tl.minimum((here - oldest) // size + 1, splits)
    start = oldest + split * size
    end = tl.minimum(start + size, tl.minimum(here, ctx))
    line = head.to(tl.int64) * room
    k_base, v_base = keys + line * D, values + line * D
    k_scales, v_scales = scales + line, scales + KV_HEADS * room.to(tl.int64) + line
    if PDL:
        BYTES: tl.constexpr = D * keys.dtype.element_ty.primitive_bitwidth // 8
        to_l2(k_base, start, tl.minimum(here, ctx - 1), room, BYTES, SOON, RING)
        to_l2(v_base, start, tl.minimum(here, ctx - 1), room, BYTES, SOON, RING)

    r, d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDE)[None, :]
    other = tl.where(d < R // 2, d + R // 2, d - R // 2)  # whom d is rotated with
    is_q, is_k, is_v = r < GROUP, r == GROUP, r == GROUP + 1
    row = tl.minimum(here, ctx - 1) * R + r * 0
    cos = tl.load(table + row + d, mask=(r <= GROUP) & (d < R), other=1.0)  # values are not rotated
    sin = tl.load(table + ctx * R + row + d, mask=(r <= GROUP) & (d < R), other=0.0)
    if NORM != 0:
        q_row = (head * GROUP + r if NORM == 2 else r * 0) * D
        k_row = (head + r * 0 if NORM == 2 else r * 0) * D
        weight = tl.load(q_norm + q_row + d, mask=is_q & (d < D), other=0.0)
        weight += tl.load(k_norm + k_row + d, mask=is_k & (d < D), other=0.0)
        if NORM != 3:
            weight_other = tl.load(q_norm + q_row + other, mask=is_q & (d < D), other=0.0)
            weight_other += tl.load(k_norm + k_row + other, mask=is_k & (d < D), other=0.0)
    g = tl.arange(0, ROWS)
    if temperature is not None:
        sharper = tl.load(temperature + tl.minimum(here, ctx - 1))
    if sinks is not None:
        sink = tl.load(sinks + head * GROUP + g, mask=g < GROUP, other=-float("inf")) * LOG_2_E
    k, k_scale = load_block(k_base, k_scales, start, end, room, D, WIDE, BLOCK, INT8, RING)
    v, v_scale = load_block(v_base, v_scales, start, end, room, D, WIDE, BLOCK, INT8, RING)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if split >= active:
        return

    source = tl.where(is_q, head * GROUP + r, tl.where(is_k, HEADS + head, HEADS + KV_HEADS + head)) * D
    inside = (r <= GROUP + 1) & (d < D)
    x = tl.load(qkv + source + d, mask=inside, other=0.0)
    y = tl.load(qkv + source + other, mask=inside & (r <= GROUP), other=0.0)
    if NORM == 1 or NORM == 2:
        if NORM == 1:
            factor = norm_factor(x, D, eps)[:, None]
        else:
            factor = tl.where(is_q, full_factor(qkv, eps, HEADS * D), full_factor(qkv + HEADS * D, eps, KV_HEADS * D))
        x = tl.where(is_v, x * factor if VNORM else x, x * factor * weight)
        y = y * factor * weight_other
    if CLIP:
        x, y = clipped(x, clip), clipped(y, clip)
    x = x * cos + tl.where(d < R // 2, -1.0, 1.0) * y * sin
    if NORM == 3:
        x = tl.where(is_v, x, x * norm_factor(x, D, eps)[:, None] * weight)
    if temperature is not None:
        x = tl.where(is_q, x * sharper, x)
    q = x.to(DOT)
    k_new = tl.sum(tl.where(is_k, x, 0.0), 0)[None, :]
    v_new = tl.sum(tl.where(is_v, x, 0.0), 0)[None, :]

    owner = split == active - 1  # of `here`
    writes = owner & (here < ctx)
    spot = here % room if RING else here
    if INT8:
        k_new, k_one = in_int8(k_new)
        v_new, v_one = in_int8(v_new)
        one = tl.arange(0, 1)
        tl.store(k_scales + spot + one, k_one.to(scales.dtype.element_ty), mask=writes & (one == 0))
        tl.store(v_scales + spot + one, v_one.to(scales.dtype.element_ty), mask=writes & (one == 0))
    k_kept, v_kept = k_new.to(keys.dtype.element_ty), v_new.to(values.dtype.element_ty)
    tl.store(k_base + spot * D + d, k_kept, mask=writes & (d < D))
    tl.store(v_base + spot * D + d, v_kept, mask=writes & (d < D))
    k_new, v_new = k_kept.to(tl.float32), v_kept.to(tl.float32)
    if INT8:
        k_new, v_new = k_new * k_one[:, None], v_new * v_one[:, None]

    score = tl.sum(q.to(tl.float32) * k_new, 1) * to_log2
    if sinks is not None:
        highest = tl.maximum(score, sink)
        fresh = tl.exp2(score - highest)
        top = tl.where(owner, highest, -float("inf"))
        total = tl.where(owner, fresh + tl.exp2(sink - highest), 0.0)
        mixed = tl.where(owner, v_new, 0.0) * fresh[:, None]
    else:
        top = tl.where(owner, score, -float("inf"))
        total = tl.where(owner, 1.0, 0.0) + tl.zeros((ROWS,), tl.float32)
        mixed = tl.where(owner, v_new, 0.0) + tl.zeros((ROWS, WIDE), tl.float32)
    visible = start + tl.arange(0, BLOCK) < end
    top, total, mixed = fold(q, k, v, k_scale, v_scale, visible, top, total, mixed, to_log2, INT8, DOT)
    for n in tl.range(start + BLOCK, end, BLOCK, num_stages=STAGES):
        k_n, k_scale_n = load_block(k_base, k_scales, n, end, room, D, WIDE, BLOCK, INT8, RING)
        v_n, v_scale_n = load_block(v_base, v_scales, n, end, room, D, WIDE, BLOCK, INT8, RING)
        seen = n + tl.arange(0, BLOCK) < end
        top, total, mixed = fold(q, k_n, v_n, k_scale_n, v_scale_n, seen, top, total, mixed, to_log2, INT8, DOT)

    if active == 1:
        at = (head * GROUP + r) * D + d
        mixed = mixed / total[:, None]
        if gate is not None:
            mixed = mixed * tl.sigmoid(tl.load(gate + at, mask=is_q & (d < D), other=0.0))
        tl.store(mixed_out + striped_index(at, HEADS * D), mixed, mask=is_q & (d < D))
        return
    part = head * splits + split
    tl.store(partial + (part * GROUP + r) * D + d, mixed, mask=is_q & (d < D))
    stats = partial + KV_HEADS * splits * GROUP * D + (part * GROUP + g) * 2
    tl.store(stats, top, mask=g < GROUP)
    tl.store(stats + 1, total, mask=g < GROUP)
    tl.debug_barrier()  # all warps' stores come before the ticket
    if tl.atomic_add(tickets + head, 1, sem="acq_rel") == active - 1:
        combine(partial, head, active, splits, gate, mixed_out, GROUP, D, KV_HEADS, WIDE, J, MANY)
        tl.store(tickets + head, 0)


def pick_splits(bucket: int, kv_heads: int, sms: int = 132) -> tuple[int, int]:
    """Return (splits, split_size) for contexts up to `bucket`: about one program per multiprocessor.

    The number per head is a power of two where many are needed, since that many are joined at once. A split is at least
    `split_size` long; where splits · split_size is shorter than the context, the device makes splits longer. So the
    splits for a model's whole context serve every length, without another capture.
    """
    most = max(1, sms // kv_heads)
    return min(-(-bucket // LEAST), 1 << most.bit_length() - 1), LEAST


def tile_of(keys: Tensor, wide: int) -> int:
    """Return the positions per tile. Two tiles of keys and values are in flight in shared memory.

    An H200 has 227 KB of it, a desktop card 99 KB: there 128 positions of 128 bfloat16 do not fit (at 32K 26 µs against
    30).
    """
    if keys.is_cuda and keys.element_size() == 2:
        most = (own_memory(keys.device) - 8192) // (8 * wide)
        return max(16, min(128, 1 << most.bit_length() - 1))
    return max(16, min(64, 16384 // (wide * keys.element_size())))


@cache
def own_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 49152))  # torch's stubs have not heard of it


def partial_size(heads: int, head_dim: int, splits: int) -> int:
    """Return the float32 values of `partial`."""
    return heads * splits * (head_dim + 2)


def decode_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, rope_table: Tensor, mixed: Tensor,
    partial: Tensor, tickets: Tensor, *,
    heads: int, kv_heads: int, head_dim: int, q_norm: Tensor | None, k_norm: Tensor | None, norm_full: bool,
    clip: float | None, eps: float, splits: int, split_size: int = LEAST, scales: Tensor | None = None,
    scale: float | None = None, norm_after: bool = False, window: int = 0, chunked: bool = False,
    sinks: Tensor | None = None, temperature: Tensor | None = None, gate: Tensor | None = None,
    value_norm: bool = False,
    pdl: bool = False, block: int | None = None, warps: int = 4, stages: int = 3,
) -> None:  # fmt: skip
    """Attend for one token at `position` [1]: q, k, v [(heads + 2 kv_heads) · D] float32 → mixed [heads · D], striped.

    Norm (`value_norm`: each value head is divided by its RMS as well), clip and rotation as in kernels.norm_rope. k and
    v are written into keys, values [kv_heads, room, D] at `position` % room (int8: with scales [2, kv_heads, room]),
    unless the position is ctx, which is out of range. room is ctx or, with a `window`, at least the window. `sinks`
    [heads] float32, `window` and `chunked` as in kernels.attention. `temperature` [ctx] float32 multiplies queries by
    position. `gate` [heads · D]: its sigmoid multiplies mixed. `partial` [partial_size(…)] float32 is scratch;
    `tickets` [kv_heads] int32 are 0 before and after. Scores are multiplied by `scale`, D ** -0.5 if None. The result
    depends on splits · split_size, not on the order in which programs run.
    """
    ctx, room, wide, group = rope_table.shape[1], keys.shape[1], triton.next_power_of_2(head_dim), heads // kv_heads
    assert qkv.numel() == (heads + 2 * kv_heads) * head_dim
    assert mixed.numel() == heads * head_dim
    assert gate is None or gate.numel() == heads * head_dim
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert (keys.dtype == torch.int8) == (scales is not None)
    assert rope_table.shape[2] <= head_dim
    assert rope_table.is_contiguous()
    assert rope_table.shape[2] % 2 == 0
    assert partial.numel() >= partial_size(heads, head_dim, splits)
    assert tickets.numel() >= kv_heads
    assert not value_norm or norm_kind(q_norm, norm_full, norm_after) == 1
    block, warps = block or min(tile_of(keys, wide), 1 << room.bit_length() - 1), max(warps, wide // 64)
    assert split_size % block == 0, f"split_size {split_size} is no multiple of {block}"
    assert room == ctx or max(window, block) <= room, f"a ring of {room} holds {window} and {block} positions"
    rows = max(16, triton.next_power_of_2(group + 2))
    many = min(triton.next_power_of_2(splits), max(1, COMBINE // wide))
    _decode[(kv_heads, splits)](
        qkv, gate, keys, values, keys if scales is None else scales, position, rope_table, temperature, q_norm, k_norm,
        sinks, mixed, partial, tickets, ctx, room, splits, split_size, clip or 0.0, eps,
        (head_dim**-0.5 if scale is None else scale) * LOG2E,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim, R=rope_table.shape[2], WIDE=wide, ROWS=rows, BLOCK=block,
        J=max(1, min(triton.next_power_of_2(group), COMBINE // (wide * many))), MANY=many, STAGES=stages, WINDOW=window,
        CHUNKED=chunked, RING=room < ctx, NORM=norm_kind(q_norm, norm_full, norm_after), VNORM=value_norm,
        CLIP=bool(clip), INT8=scales is not None, DOT=dot_type(keys), num_warps=warps, **dependent(pdl),
    )  # fmt: skip


def dot_type(keys: Tensor) -> tl.dtype:
    """Return the type of the products. int8 becomes bfloat16, which holds it exactly (the interpreter has it wrong)."""
    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return names.get(keys.dtype, tl.bfloat16 if keys.is_cuda else tl.float32)
