"""Gated DeltaNet (kernels.deltanet): one token in one launch between two projections, a prompt in three launches.

A token's programs keep a value head's memory in registers from the first load to the last store. The memory, the newest
inputs and the weights were written by earlier graph launches or never change, so they are loaded while the preceding
kernel still runs. The convolution's inputs are kept in a ring by position: no load touches the row of the present one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.deltanet import UNIT_EPS, DeltaWeights
from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.shortconv import past
from offmoe.kernels.gpu.striped import striped_index
from offmoe.kernels.shortconv import newest

TINY = tl.constexpr(UNIT_EPS)
ROWS = 16  # tokens of a program that only reads and writes
COLUMNS = 8  # of a head's memory that a warp carries through a prompt: 128 rows of them are 32 registers a lane


@triton.jit
def convolved(x, total, weight):
    y = total + x * weight
    return y * tl.sigmoid(y)


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit(do_not_specialize_on_alignment=["recent"])
def _delta_step(
    projected, memory, recent, conv, decay, dt, norm, position, status, out, ctx, scale, eps,
    KEY_HEADS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    TAPS: tl.constexpr, TILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (HEADS,)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    SERVED: tl.constexpr = HEADS // KEY_HEADS
    KEYS: tl.constexpr = KEY_HEADS * K
    C: tl.constexpr = 2 * KEYS + HEADS * V
    head = tl.program_id(0)
    if TILED:
        key_head = head % KEY_HEADS
        first = head < KEY_HEADS
    else:
        key_head = head // SERVED
        first = head % SERVED == 0
    here, state = tl.load(position).to(tl.int32), tl.load(status)
    i, j = tl.arange(0, WK), tl.arange(0, WV)
    at_q, at_k, at_v = key_head * K, KEYS + key_head * K, 2 * KEYS + head * V
    inside = (i < K)[:, None] & (j < V)[None, :]
    cell = memory + head * (K * V) + i[:, None] * V + j[None, :]
    s = tl.load(cell, mask=inside, other=0.0)
    q_past, q_weight = past(recent, conv, at_q + i, i < K, here, TAPS, C)
    k_past, k_weight = past(recent, conv, at_k + i, i < K, here, TAPS, C)
    v_past, v_weight = past(recent, conv, at_v + j, j < V, here, TAPS, C)
    gain = tl.load(norm + j, mask=j < V, other=0.0)
    rate, shift = tl.load(decay + head), tl.load(dt + head)
    if PDL:
        tl.extra.cuda.gdc_wait()

    x_q = tl.load(projected + at_q + i, mask=i < K, other=0.0)
    x_k = tl.load(projected + at_k + i, mask=i < K, other=0.0)
    x_v = tl.load(projected + at_v + j, mask=j < V, other=0.0)
    z = tl.load(projected + C + head * V + j, mask=j < V, other=0.0)
    beta = tl.sigmoid(tl.load(projected + C + HEADS * V + head))
    lasting = tl.exp(rate * softplus(tl.load(projected + C + HEADS * V + HEADS + head) + shift))
    q, k, v = convolved(x_q, q_past, q_weight), convolved(x_k, k_past, k_weight), convolved(x_v, v_past, v_weight)
    q = q * tl.rsqrt(tl.sum(q * q, 0) + TINY) * scale
    k = k * tl.rsqrt(tl.sum(k * k, 0) + TINY)

    s = s * lasting
    change = (v - tl.sum(s * k[:, None], 0)) * beta
    s = s + k[:, None] * change[None, :]
    y = tl.sum(s * q[:, None], 0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / V + eps) * gain * z * tl.sigmoid(z)
    tl.store(out + striped_index(head * V + j, HEADS * V), y, mask=j < V)

    lives = (state == 0) & (here < ctx)  # a step behind the end of an answer leaves everything as it is
    tl.store(cell, s, mask=inside & lives)
    row = recent + here % TAPS * C
    tl.store(row + at_v + j, x_v, mask=(j < V) & lives)
    tl.store(row + at_q + i, x_q, mask=(i < K) & first & lives)
    tl.store(row + at_k + i, x_k, mask=(i < K) & first & lives)


def delta_step(
    projected: Tensor, w: DeltaWeights, memory: Tensor, recent: Tensor, position: Tensor, status: Tensor,
    out: Tensor, *, ctx: int, pdl: bool = False,
) -> None:  # fmt: skip
    """Mix the token at `position` [1]: projected [sum of Delta.projected] float32 → out [values] float32, striped.

    memory [value_heads, K, V] and recent [taps, channels] are updated in place, as in kernels.deltanet.delta_mix,
    unless status [1] is not 0 or the position is `ctx`.
    """
    d = w.shape
    assert projected.numel() == sum(d.projected)
    assert out.numel() == d.values
    assert memory.is_contiguous()
    assert memory.shape == (d.value_heads, d.key_dim, d.value_dim)
    assert recent.is_contiguous()
    assert recent.shape == w.conv.shape == (d.taps, d.channels)
    wide = triton.next_power_of_2(d.key_dim), triton.next_power_of_2(d.value_dim)
    _delta_step[(d.value_heads,)](
        projected, memory, recent, w.conv, w.decay, w.dt, w.norm, position, status, out, ctx, d.key_dim**-0.5, w.eps,
        KEY_HEADS=d.key_heads, HEADS=d.value_heads, K=d.key_dim, V=d.value_dim, WK=wide[0], WV=wide[1], TAPS=d.taps,
        TILED=w.tiled, num_warps=8 if wide[0] * wide[1] > 4096 else 4, **dependent(pdl),
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "start"])
def _convolve(
    projected, recent, conv, out, tokens, start, stride, scale,
    KEY_HEADS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (tokens / ROWS, heads of q, k and v): convolve; q and k get unit length, q is multiplied by `scale`."""
    C: tl.constexpr = 2 * KEY_HEADS * K + HEADS * V
    head, d = tl.program_id(1), tl.arange(0, WIDE)
    is_value = head >= 2 * KEY_HEADS
    first = tl.where(is_value, 2 * KEY_HEADS * K + (head - 2 * KEY_HEADS) * V, head * K)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = d < tl.where(is_value, V, K)
    inside = (t < tokens)[:, None] & there[None, :]
    y = tl.zeros((ROWS, WIDE), tl.float32)
    for i in tl.static_range(TAPS):
        at = t + (i - TAPS + 1)
        fresh = (at >= 0)[:, None]
        x = tl.load(projected + at.to(tl.int64)[:, None] * stride + first + d[None, :], mask=inside & fresh, other=0.0)
        row = (start + at + TAPS) % TAPS
        old = tl.load(recent + row[:, None] * C + first + d[None, :], mask=inside & (at < 0)[:, None], other=0.0)
        weight = tl.load(conv + i * C + first + d, mask=there, other=0.0)
        y += tl.where(fresh, x.to(tl.float32), old) * weight[None, :]
    y = y * tl.sigmoid(y)
    unit = tl.rsqrt(tl.sum(y * y, 1) + TINY) * tl.where(head < KEY_HEADS, scale, 1.0)
    y = y * tl.where(is_value, 1.0, unit)[:, None]
    tl.store(out + t.to(tl.int64)[:, None] * C + first + d[None, :], y, mask=inside)


@triton.jit
def inputs_of(
    row, gates, there, head, key_head, j, rate, shift,
    KEY_HEADS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr,
):  # fmt: skip
    """Load one token's recurrence inputs: q and k [WK], v in columns j, e^g and β, from `row` and `gates`."""
    i = tl.arange(0, WK)
    q = tl.load(row + key_head * K + i, mask=there & (i < K), other=0.0)
    k = tl.load(row + (KEY_HEADS + key_head) * K + i, mask=there & (i < K), other=0.0)
    v = tl.load(row + 2 * KEY_HEADS * K + head * V + j, mask=there & (j < V), other=0.0)
    beta = tl.sigmoid(tl.load(gates, mask=there, other=0.0).to(tl.float32))
    a = tl.load(gates + HEADS, mask=there, other=0.0).to(tl.float32)
    return q, k, v, tl.exp(rate * softplus(a + shift)), beta


@triton.jit(do_not_specialize=["tokens"])
def _recur(
    projected, convolved, decay, dt, memory, out, tokens, stride,
    KEY_HEADS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr,
    COLUMNS: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Grid (HEADS, V / COLUMNS), one warp each: token after token over independent columns of a head's memory.

    The next token's inputs are loaded while the present one is computed.
    """
    C: tl.constexpr = 2 * KEY_HEADS * K + HEADS * V
    head, i = tl.program_id(0), tl.arange(0, WK)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if TILED:
        key_head = head % KEY_HEADS
    else:
        key_head = head // (HEADS // KEY_HEADS)
    cell = memory + head * (K * V) + i[:, None] * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    s = tl.load(cell, mask=inside, other=0.0)
    rate, shift = tl.load(decay + head), tl.load(dt + head)
    row, gates, spot = convolved, projected + C + HEADS * V + head, out + head * V + j
    q, k, v, lasting, beta = inputs_of(
        row, gates, tokens > 0, head, key_head, j, rate, shift, KEY_HEADS, HEADS, K, V, WK
    )  # fmt: skip
    for t in range(tokens):
        row += C
        gates += stride
        next_q, next_k, next_v, next_lasting, next_beta = inputs_of(
            row, gates, t + 1 < tokens, head, key_head, j, rate, shift, KEY_HEADS, HEADS, K, V, WK
        )  # fmt: skip
        s = s * lasting
        change = (v - tl.sum(s * k[:, None], 0)) * beta
        s = s + k[:, None] * change[None, :]
        tl.store(spot, tl.sum(s * q[:, None], 0), mask=j < V)
        spot += HEADS * V
        q, k, v, lasting, beta = next_q, next_k, next_v, next_lasting, next_beta
    tl.store(cell, s, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _gate(
    mixed, projected, norm, out, tokens, stride, eps,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, V: tl.constexpr, WV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (tokens / ROWS, HEADS): each head's norm, times silu of z."""
    head, j = tl.program_id(1), tl.arange(0, WV)
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = (t < tokens)[:, None] & (j < V)[None, :]
    at = (t[:, None] * HEADS + head) * V + j[None, :]
    y = tl.load(mixed + at, mask=inside, other=0.0)
    z = tl.load(projected + t[:, None] * stride + CHANNELS + head * V + j[None, :], mask=inside, other=0.0)
    z = z.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 1) / V + eps)[:, None] * tl.load(norm + j, mask=j < V, other=0.0)[None, :]
    tl.store(out + at, (y * z * tl.sigmoid(z)).to(out.dtype.element_ty), mask=inside)


def delta_chunk(projected: Tensor, w: DeltaWeights, memory: Tensor, recent: Tensor, start: int) -> Tensor:
    """Mix a prompt's tokens like kernels.deltanet.delta_mix: [T, values] in the type of `projected` [T, …]."""
    d, tokens = w.shape, len(projected)
    assert projected.stride(1) == 1
    assert memory.is_contiguous()
    assert recent.is_contiguous()
    rows, stride, out = triton.cdiv(tokens, ROWS), projected.stride(0), projected.new_empty((tokens, d.values))
    convolved, mixed = (torch.empty((tokens, width), device=projected.device) for width in (d.channels, d.values))
    heads = {"KEY_HEADS": d.key_heads, "HEADS": d.value_heads, "K": d.key_dim, "V": d.value_dim}
    wide = triton.next_power_of_2(d.key_dim), triton.next_power_of_2(d.value_dim)
    _convolve[(rows, 2 * d.key_heads + d.value_heads)](
        projected, recent, w.conv, convolved, tokens, start, stride, d.key_dim**-0.5, **heads, WIDE=max(wide),
        TAPS=d.taps, ROWS=ROWS,
    )  # fmt: skip
    newest(projected[:, : d.channels], recent, start)
    _recur[(d.value_heads, triton.cdiv(d.value_dim, COLUMNS))](
        projected, convolved, w.decay, w.dt, memory, mixed, tokens, stride, **heads, WK=wide[0], COLUMNS=COLUMNS,
        TILED=w.tiled, num_warps=1,
    )  # fmt: skip
    _gate[(rows, d.value_heads)](
        mixed, projected, w.norm, out, tokens, stride, w.eps, CHANNELS=d.channels, HEADS=d.value_heads, V=d.value_dim,
        WV=wide[1], ROWS=ROWS,
    )  # fmt: skip
    return out
