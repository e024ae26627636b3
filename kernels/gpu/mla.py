"""Latent attention of one token (kernels.mla) in three launches.

Queries are projected into the latent space, one pass over the latents attends (divided as in kernels.gpu.attention),
and the mixed latents are projected back to values. All heads share each row of the cache, so a program has up to 16
heads. The partial results of the splits are joined by the programs that multiply them next: no program waits for
another. Position and rope row are read before the preceding kernel has ended, and old rows of the cache are in flight:
an earlier graph launch wrote them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.attention import LOG2E, dot_type, joined, partial_of, to_l2, unjoined
from offmoe.kernels.gpu.formats.dot import UNIT, fold, x_of
from offmoe.kernels.gpu.formats.grids import grids_for
from offmoe.kernels.gpu.gemv import Part, interpreted, multiprocessors, planes, rows_of, tile
from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.striped import striped_index
from offmoe.kernels.mla import LATENT_EPS, Latent

LEAST = 128  # positions of a split, at least: 144 KiB of latents in bfloat16
MOST_SPLITS = 64  # every program of the last launch reads what all of them made of its head
HEADS = 16  # a program's, at most: rows of the smallest MMA
AT_ONCE = 4096  # weights of a tile in the products


@triton.jit
def divided(here, splits, least, BLOCK: tl.constexpr):
    """Return the positions per split, and the number of splits that have any."""
    size = tl.maximum(least, tl.cdiv(tl.cdiv(here + 1, splits), BLOCK) * BLOCK)
    return size, tl.minimum(here // size + 1, splits)


@triton.jit
def join(partial, mine, head, active, splits, HEADS: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
         MANY: tl.constexpr):  # fmt: skip
    """Join the splits' partial results of a head into the program's own scratch [K], striped."""
    stats = partial + splits * HEADS * K
    one, n, d = tl.arange(0, 1)[:, None], tl.arange(0, MANY)[None, :], tl.arange(0, WIDE)[None, :]
    top, total, result = unjoined(1, WIDE)
    for first in range(0, active, MANY):
        values, tops, totals = partial_of(partial, stats, head + one, first + n, active, HEADS, K, WIDE)
        top, total, result = joined(top, total, result, values, tops, totals)
    tl.store(mine + striped_index(d, K), result / total[:, None], mask=d < K)
    tl.debug_barrier()  # all warps read it


@triton.jit
def _heads(
    x, buffer, out, position, splits, least, each, grids,
    HEADS: tl.constexpr, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
    FORMAT: tl.constexpr, WIDTH: tl.constexpr, JOINED: tl.constexpr, WIDE: tl.constexpr, MANY: tl.constexpr,
    BLOCK: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs, HEADS). Multiply every head's matrix by its part of x.

    Not JOINED: x [HEADS · K] is striped and `out` is not. JOINED: x holds the partial results, then a scratch of K per
    program; `out` is striped.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    UNITS: tl.constexpr = K // WIDTH
    which, head = tl.program_id(0), tl.program_id(1)
    u, r = tl.arange(0, U), tl.arange(0, R)
    there, none = u < UNITS, tl.zeros((U,), tl.int32)
    first = head * N + which * each
    end = tl.minimum(first + each, head * N + N)
    words = rows_of(buffer, none, u, there, first + r, end, UNITS, FORMAT, P0, P1, P2, P3)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if JOINED:
        here = tl.load(position).to(tl.int32)
        _, active = divided(here, splits, least, BLOCK)
        mine = x + splits * HEADS * (K + 2) + (head * tl.num_programs(0) + which) * K
        join(x, mine, head, active, splits, HEADS, K, WIDE, MANY)
        xs = x_of(mine, mine, none, u * WIDTH, there, FORMAT, K, False, grids)
    else:
        xs = x_of(x, x, none, head * K + u * WIDTH, there, FORMAT, HEADS * K, False, grids)
    for row in range(first, end, R):
        at, ahead = row + r, row + R + r
        following = rows_of(buffer, none, u, there, ahead, end, UNITS, FORMAT, P0, P1, P2, P3)
        if JOINED:
            tl.store(out + striped_index(at, HEADS * N), fold(words, xs, FORMAT), mask=at < end)
        else:
            tl.store(out + at, fold(words, xs, FORMAT), mask=at < end)
        words = following


@triton.jit
def load_latents(cache, start, end, L: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, ROTARY: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Load positions start …: latents [BLOCK, WIDE] and rotated keys, 0 from `end` on."""
    n, d, e = start + tl.arange(0, BLOCK), tl.arange(0, WIDE), tl.arange(0, ROTARY)
    rows = cache + n.to(tl.int64)[:, None] * (L + R)
    seen = (n < end)[:, None]
    latents = tl.load(rows + d[None, :], mask=seen & (d < L)[None, :], other=0)
    return latents, tl.load(rows + L + e[None, :], mask=seen & (e < R)[None, :], other=0)


@triton.jit
def rotate(base, rows, cos, sin, R: tl.constexpr, ROTARY: tl.constexpr, mask):
    """Rows [N, 1] of R values at `base`, rotated: [N, ROTARY]."""
    e = tl.arange(0, ROTARY)[None, :]
    other = tl.where(e < R // 2, e + R // 2, e - R // 2)  # whom e is rotated with
    inside = mask & (e < R)
    x = tl.load(base + rows * R + e, mask=inside, other=0.0)
    y = tl.load(base + rows * R + other, mask=inside, other=0.0)
    return x * cos[None, :] + tl.where(e < R // 2, -1.0, 1.0) * y * sin[None, :]


@triton.jit
def _attend(
    query, rope, fresh, norm, cache, position, table, partial, ctx, splits, least, eps, to_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, L: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr,
    ROTARY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (HEADS / GROUP, splits)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block, split = tl.program_id(0), tl.program_id(1)
    here = tl.load(position).to(tl.int32)
    size, active = divided(here, splits, least, BLOCK)
    start = split * size
    end = tl.minimum(start + size, tl.minimum(here + 1, ctx))
    if PDL:
        BYTES: tl.constexpr = (L + R) * cache.dtype.element_ty.primitive_bitwidth // 8
        to_l2(cache, start, tl.minimum(here, ctx - 1), ctx, BYTES, 4 * BLOCK, False)
    r, d, e = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, ROTARY)
    line = tl.minimum(here, ctx - 1) * R
    cos = tl.load(table + line + e, mask=e < R, other=1.0)
    sin = tl.load(table + ctx * R + line + e, mask=e < R, other=0.0)
    gain = tl.load(norm + d, mask=d < L, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if split >= active:
        return

    head, is_q = block * GROUP + r, (r < GROUP)[:, None]
    q = tl.load(query + head[:, None] * L + d[None, :], mask=is_q & (d < L)[None, :], other=0.0).to(DOT)
    q_rope = rotate(rope, head[:, None], cos, sin, R, ROTARY, is_q).to(DOT)
    if split == active - 1:  # every group writes the new row, the same bits, and reads its own
        latent = tl.load(fresh + d, mask=d < L, other=0.0)
        latent = latent * tl.rsqrt(tl.sum(latent * latent, 0) / L + eps) * gain
        one = tl.zeros((1, 1), tl.int32)
        key = rotate(fresh + L, one, cos, sin, R, ROTARY, one == 0)
        row = cache + here.to(tl.int64) * (L + R)
        tl.store(row + d, latent.to(cache.dtype.element_ty), mask=(here < ctx) & (d < L))
        tl.store(row + L + e[None, :], key.to(cache.dtype.element_ty), mask=(here < ctx) & (e < R)[None, :])
        tl.debug_barrier()

    top, total = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE), tl.float32)
    for n in tl.range(start, end, BLOCK, num_stages=STAGES):
        latents, keys = load_latents(cache, n, end, L, R, WIDE, ROTARY, BLOCK)
        seen = n + tl.arange(0, BLOCK) < end
        top, total, mixed = gather(q, q_rope, latents, keys, seen, top, total, mixed, to_log2, DOT)

    part = split * HEADS + head
    tl.store(partial + part[:, None] * L + d[None, :], mixed, mask=is_q & (d < L)[None, :])
    stats = partial + splits * HEADS * L + part * 2
    tl.store(stats, top, mask=r < GROUP)
    tl.store(stats + 1, total, mask=r < GROUP)


@triton.jit
def gather(q, q_rope, latents, keys, visible, top, total, mixed, to_log2, DOT: tl.constexpr):
    """Add one block to the running softmax: q [R, W], rotated q [R, T], latents [B, W], keys [B, T]."""
    latents = latents.to(DOT)
    scores = tl.dot(q, tl.trans(latents), input_precision="ieee")
    scores = tl.dot(q_rope, tl.trans(keys.to(DOT)), scores, input_precision="ieee") * to_log2
    scores = tl.where(visible[None, :], scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    old = tl.exp2(top - higher)
    p = tl.exp2(scores - higher[:, None])
    total = total * old + tl.sum(p, 1)
    return higher, total, tl.dot(p.to(DOT), latents, mixed * old[:, None], input_precision="ieee")


def pick_splits(ctx: int, heads: int, sms: int = 132) -> tuple[int, int]:
    """Return (splits, least positions per split) for every context up to `ctx`, like gpu.attention.pick_splits."""
    return max(1, min(-(-ctx // LEAST), sms // (heads // group_of(heads)), MOST_SPLITS)), LEAST


def group_of(heads: int) -> int:
    """Return the heads per program."""
    return next(group for group in range(min(HEADS, heads), 0, -1) if heads % group == 0)


def programs_of(heads: int, device: torch.device) -> int:
    """Return the programs that share a head's product where each has to join the partial results."""
    return 1 if interpreted() else max(1, multiprocessors(device) // heads)


def partial_size(heads: int, z: Latent, splits: int, device: torch.device) -> int:
    """Return the float32 values of `partial`: the splits' results, and the scratch of the programs that join them."""
    return heads * (splits * (z.kv_rank + 2) + programs_of(heads, device) * z.kv_rank)


def head_products(x: Tensor, part: Part, out: Tensor, heads: int, splits: tuple[int, int, Tensor, int] | None,
                  pdl: bool) -> None:  # fmt: skip
    """Multiply every head's matrix of `part`, [heads · N, K], by its part of x.

    `splits`: x is joined (see _heads) out of at most that many splits, of a least number of positions each, up to the
    position [1], in blocks.
    """
    buffer, form = part
    k, n = form.cols, form.rows // heads
    assert k % UNIT[form.format] == 0, f"{k} columns are no whole number of {form.format} units"
    rows = tile() if interpreted() else max(1, AT_ONCE // triton.next_power_of_2(k))
    shared = programs_of(heads, x.device) * (1 if splits else 2)
    each = rows * triton.cdiv(n, rows * shared)
    count, least, position, block = splits or (1, 1, x, 16)
    _heads[(triton.cdiv(n, each), heads)](
        x, buffer, out, position, count, least, each, grids_for(x.device, form.format), HEADS=heads, K=k, N=n, R=rows,
        U=triton.next_power_of_2(k // UNIT[form.format]), FORMAT=form.format, WIDTH=UNIT[form.format],
        JOINED=splits is not None, WIDE=triton.next_power_of_2(k), MANY=min(8, triton.next_power_of_2(count)),
        BLOCK=block, **planes("P", form), num_warps=4, **dependent(pdl),
    )  # fmt: skip


def decode_latents(
    query: Tensor, fresh: Tensor, cache: Tensor, position: Tensor, table: Tensor, norm: Tensor,
    k_b: Part, v_b: Part, mixed: Tensor, absorbed: Tensor, partial: Tensor, *,
    heads: int, latent: Latent, scale: float, splits: int, split_size: int = LEAST, pdl: bool = False,
    block: int | None = None, warps: int = 8, stages: int = 3,
) -> None:  # fmt: skip
    """Attend for one token at `position` [1]: query [heads · (N + R)] float32 → mixed [heads · V] float32, striped.

    The query holds the N values of all heads, striped, then their R values; `fresh` [L + R] float32 is the token's
    latent and rope key. The latent is normed with `norm` [L] float32, the R values are rotated; both are written into
    cache [ctx, L + R] at `position`, unless it is ctx, which is out of range. k_b [heads · L, N] and v_b [heads · V, L]
    are in slot layout. `absorbed` [heads · L] and `partial` [partial_size(…)] float32 are scratch. Compiled for sm_80
    and sm_90, a block of 32 in three stages takes 91 KiB of shared memory and 96 registers. The result depends on
    splits · split_size, not on the order in which programs run.
    """
    z, ctx, group = latent, len(cache), group_of(heads)
    block, stages = block or (16 if cache.dtype == torch.float32 else 32), 2 if cache.dtype == torch.float32 else stages
    assert query.numel() == heads * z.key and fresh.numel() == z.width and query.is_contiguous()
    assert mixed.numel() == heads * z.value and absorbed.numel() == heads * z.kv_rank
    assert cache.shape[1] == z.width and cache.is_contiguous() and cache.dtype != torch.int8
    assert table.shape[1:] == (ctx, z.qk_rope) and table.is_contiguous()
    assert partial.numel() >= partial_size(heads, z, splits, query.device)
    assert split_size % block == 0, f"split_size {split_size} is no multiple of {block}"
    assert (k_b[1].rows, k_b[1].cols) == (heads * z.kv_rank, z.qk_nope)
    assert (v_b[1].rows, v_b[1].cols) == (heads * z.value, z.kv_rank)
    head_products(query, k_b, absorbed, heads, None, pdl)
    _attend[(heads // group, splits)](
        absorbed, query[heads * z.qk_nope :], fresh, norm, cache, position, table, partial, ctx, splits, split_size,
        LATENT_EPS, scale * LOG2E, HEADS=heads, GROUP=group, L=z.kv_rank, R=z.qk_rope,
        WIDE=triton.next_power_of_2(z.kv_rank), ROTARY=max(16, triton.next_power_of_2(z.qk_rope)), ROWS=HEADS,
        BLOCK=block, STAGES=stages, DOT=dot_type(cache), num_warps=warps, **dependent(pdl),
    )  # fmt: skip
    head_products(partial, v_b, mixed, heads, (splits, split_size, position, block), pdl)
