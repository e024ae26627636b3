"""One token through a gated DeltaNet layer, all between its two products in one launch: see kernels.deltanet.

A program a value head, whose memory it keeps in registers from the first load to the last store. The memory, the
newest inputs and the weights were written by earlier graph launches or never: they come while the kernel before this
one still runs. The inputs of the convolution lie in a ring by position, so nobody reads where the present one goes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.deltanet import UNIT_EPS, DeltaWeights
from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.striped import place

TINY = tl.constexpr(UNIT_EPS)


@triton.jit
def past(recent, conv, first, here, D: tl.constexpr, WIDE: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr):
    """Of channels first … first + D: the earlier taps, multiplied and summed, and the present one's weight."""
    d = tl.arange(0, WIDE)
    inside = d < D
    total = tl.zeros((WIDE,), tl.float32)
    for i in tl.static_range(TAPS - 1):
        row = (here + i + 1) % TAPS  # of position here - (TAPS - 1 - i)
        x = tl.load(recent + row * C + first + d, mask=inside, other=0.0)
        total += x * tl.load(conv + i * C + first + d, mask=inside, other=0.0)
    return total, tl.load(conv + (TAPS - 1) * C + first + d, mask=inside, other=0.0)


@triton.jit
def convolved(x, total, weight):
    y = total + x * weight
    return y * tl.sigmoid(y)


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit(do_not_specialize_on_alignment=["memory", "recent"])
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
    q_past, q_weight = past(recent, conv, at_q, here, K, WK, TAPS, C)
    k_past, k_weight = past(recent, conv, at_k, here, K, WK, TAPS, C)
    v_past, v_weight = past(recent, conv, at_v, here, V, WV, TAPS, C)
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
    tl.store(out + place(head * V + j, HEADS * V), y, mask=j < V)

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
    """The token at `position` [1]: projected [sum of Delta.projected] float32 → out [values] float32, striped.

    memory [value_heads, K, V] and recent [taps, channels] go on in place, as in kernels.deltanet.delta_mix; not where
    status [1] is other than 0 or the position is `ctx`.
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
