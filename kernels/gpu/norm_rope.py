"""RMS norm, rotary embedding and the KV write of many tokens, in one pass over q, k and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # heads a program turns


@triton.jit
def norm_factor(x, count, eps):
    """Return 1 / RMS of each row [R] of x [R, W], which is zero beyond `count` columns."""
    return tl.rsqrt(tl.sum(x * x, 1) / count + eps)


@triton.jit
def full_factor(base, eps, COUNT: tl.constexpr):
    """Return 1 / RMS of the COUNT values at `base`."""
    PADDED: tl.constexpr = triton.next_power_of_2(COUNT)
    at = tl.arange(0, PADDED)
    x = tl.load(base + at, mask=at < COUNT, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 0) / COUNT + eps)


@triton.jit
def normed_rotated(
    base, weight, cos, sin, first, heads, clip, eps,
    D: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """Return heads first … first + ROWS of the ALL · D values at `base`, normed, clipped and rotated: [ROWS, WIDE]
    float32.

    The first R columns are rotated; from R on cos is 1 and sin 0. Rows from `heads` on and columns from D on are 0.
    NORM 0: none, 1: per head, 2: over all heads, 3: per head after rotation. cos, sin [WIDE].
    """
    row, d = first + tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = (row < heads)[:, None] & (d < D)[None, :]
    other = tl.where(d < R // 2, d + R // 2, d - R // 2)  # whom d is rotated with
    x = tl.load(base + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(base + row[:, None] * D + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM == 1:
        factor = norm_factor(x, D, eps)[:, None]
        x = x * factor * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        y = y * factor * tl.load(weight + other, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if NORM == 2:
        factor = full_factor(base, eps, ALL * D)
        x = x * factor * tl.load(weight + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        y = y * factor * tl.load(weight + row[:, None] * D + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if CLIP:
        x, y = clipped(x, clip), clipped(y, clip)
    rotated = x * cos[None, :] + tl.where(d < R // 2, -1.0, 1.0)[None, :] * y * sin[None, :]
    if NORM == 3:
        gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        rotated = rotated * norm_factor(rotated, D, eps)[:, None] * gain[None, :]
    return rotated


@triton.jit
def clipped(x, clip):
    """Clamp to ± limit; NaN stays NaN."""
    return tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))


@triton.jit
def in_int8(x):
    """Quantise x [R, W] to integers -127 … 127 (in float32) and scales [R], as kernels.kv does."""
    largest = tl.max(tl.abs(x), 1)
    inverse = tl.where(largest > 0, tl.div_rn(127.0, tl.where(largest > 0, largest, 1.0)), 0.0)
    shift = 12582912.0  # 1.5 · 2 ** 23: adding and taking away rounds to a whole number, half to even
    return (x * inverse[:, None] + shift) - shift, tl.div_rn(largest, 127.0)


@triton.jit(do_not_specialize=["room", "first_kept"], do_not_specialize_on_alignment=["positions"])
def _norm_rope_write(
    qkv, q_out, keys, values, scales, positions, table, q_norm, k_norm, ctx, room, first_kept, stride, clip, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, NORM: tl.constexpr, VNORM: tl.constexpr, CLIP: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Grid (T, blocks of q's heads, then of k's, then of v's)."""
    Q_BLOCKS: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    K_BLOCKS: tl.constexpr = (KV_HEADS + ROWS - 1) // ROWS
    t, block = tl.program_id(0), tl.program_id(1)
    base = qkv + t.to(tl.int64) * stride
    position = tl.load(positions + t).to(tl.int64)
    d = tl.arange(0, WIDE)
    cos = tl.load(table + position * R + d, mask=d < R, other=1.0)
    sin = tl.load(table + (ctx + position) * R + d, mask=d < R, other=0.0)
    if block < Q_BLOCKS:
        row = block * ROWS + tl.arange(0, ROWS)
        q = normed_rotated(
            base, q_norm, cos, sin, block * ROWS, HEADS, clip, eps, D, R, WIDE, ROWS, HEADS, NORM, CLIP
        )  # fmt: skip
        at = (t.to(tl.int64) * HEADS + row)[:, None] * D + d[None, :]
        tl.store(q_out + at, q.to(q_out.dtype.element_ty), mask=(row < HEADS)[:, None] & (d < D)[None, :])
    elif block < Q_BLOCKS + K_BLOCKS:
        first = (block - Q_BLOCKS) * ROWS
        k = normed_rotated(
            base + HEADS * D, k_norm, cos, sin, first, KV_HEADS, clip, eps, D, R, WIDE, ROWS, KV_HEADS, NORM, CLIP
        )  # fmt: skip
        write_rows(k, keys, scales, first, position - first_kept, room, KV_HEADS, D, WIDE, ROWS, INT8)
    else:
        first = (block - Q_BLOCKS - K_BLOCKS) * ROWS
        row = first + tl.arange(0, ROWS)
        inside = (row < KV_HEADS)[:, None] & (d < D)[None, :]
        v = tl.load(base + (HEADS + KV_HEADS + row[:, None]) * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if VNORM:
            v = v * norm_factor(v, D, eps)[:, None]
        if CLIP:
            v = clipped(v, clip)
        write_rows(v, values, scales + KV_HEADS * room, first, position - first_kept, room, KV_HEADS, D, WIDE, ROWS,
                   INT8)  # fmt: skip


@triton.jit
def write_rows(
    x, cache, scales, first, place, room,
    KV_HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Write x [ROWS, WIDE], heads from `first` on, into cache [KV_HEADS, room, D] and scales [KV_HEADS, room]."""
    row, d = first + tl.arange(0, ROWS), tl.arange(0, WIDE)
    fits = (row < KV_HEADS) & (place < room)
    if INT8:
        x, scale = in_int8(x)
        tl.store(scales + row.to(tl.int64) * room + place, scale.to(scales.dtype.element_ty), mask=fits)
    at = (row.to(tl.int64) * room + place)[:, None] * D + d[None, :]
    tl.store(cache + at, x.to(cache.dtype.element_ty), mask=fits[:, None] & (d < D)[None, :])


@triton.jit
def _rms_norm(x, weight, bias, out, eps, H: tl.constexpr, WIDE: tl.constexpr):
    """One row per program."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, WIDE)
    row = tl.load(x + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    if bias is not None:
        row = tl.where(h < H, row - tl.sum(row, 0) / H, 0.0)
    row = row * tl.rsqrt(tl.sum(row * row, 0) / H + eps) * tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32)
    if bias is not None:
        row += tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out + t * H + h, row.to(out.dtype.element_ty), mask=h < H)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """Norm x [T, H] of any float type into out [T, H], rounded once to its type; with a bias, LayerNorm. Return out."""
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert x.shape == out.shape
    wide = triton.next_power_of_2(x.shape[1])
    _rms_norm[(len(x),)](x, weight, bias, out, eps, x.shape[1], wide, num_warps=8 if wide > 2048 else 4)
    return out


def norm_kind(weight: Tensor | None, full: bool, after: bool) -> int:
    """Return the constexpr NORM of the head norm."""
    return 0 if weight is None else 2 if full else 3 if after else 1


def norm_rope_write(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rope_table: Tensor, *,
    heads: int, kv_heads: int, head_dim: int, q_norm: Tensor | None, k_norm: Tensor | None,
    clip: float | None, eps: float, scales: Tensor | None = None, out: Tensor | None = None, first: int = 0,
    norm_after: bool = False, value_norm: bool = False,
) -> Tensor:  # fmt: skip
    """Norm, clip and rotate q, k, v of T tokens [T, (heads + 2 kv_heads) · D]; write k and v into the cache.

    keys, values [kv_heads, room, D] and, for int8, scales [2, kv_heads, room], whose row 0 is position `first`, are
    written at `positions` [T]. The norms are as wide as their weights: [D] per head, [heads · D] over all heads;
    `norm_after`: after rotation. `value_norm`: each value head is divided by its RMS. Returns q [T, heads, D] in `out`,
    or in the cache's type (for int8 in qkv's).
    """
    assert qkv.stride(1) == 1
    assert qkv.shape[1] == (heads + 2 * kv_heads) * head_dim
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert (keys.dtype == torch.int8) == (scales is not None)
    assert rope_table.shape[2] <= head_dim
    assert rope_table.is_contiguous()
    assert rope_table.shape[2] % 2 == 0
    dtype = qkv.dtype if scales is not None else keys.dtype
    q = torch.empty((len(qkv), heads, head_dim), device=qkv.device, dtype=dtype) if out is None else out
    blocks = triton.cdiv(heads, ROWS) + 2 * triton.cdiv(kv_heads, ROWS)
    full = q_norm is not None and q_norm.numel() == heads * head_dim and heads > 1
    _norm_rope_write[(len(qkv), blocks)](
        qkv, q, keys, values, keys if scales is None else scales, positions, rope_table, q_norm, k_norm,
        rope_table.shape[1], keys.shape[1], first, qkv.stride(0), clip or 0.0, eps,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim, R=rope_table.shape[2],
        WIDE=triton.next_power_of_2(head_dim), ROWS=ROWS,
        NORM=norm_kind(q_norm, full, norm_after), VNORM=value_norm, CLIP=bool(clip),
        INT8=scales is not None, num_warps=4,
    )  # fmt: skip
    return q
