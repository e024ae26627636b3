"""Gated short convolutions (kernels.shortconv): one token in one launch between two projections, or a prompt.

The newest inputs and the weights were written by earlier graph launches or never change, so they are loaded while the
preceding kernel still runs. The inputs are kept in a ring by position, so no load touches the row of the present one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.striped import striped_index
from offmoe.kernels.shortconv import ConvWeights, newest

ROWS = 16  # tokens of a program
WIDE = 128  # channels of one


@triton.jit
def past(recent, conv, c, inside, here, TAPS: tl.constexpr, C: tl.constexpr):
    """Return the weighted sum of the earlier taps of channels c, and the present tap's weight."""
    total = tl.zeros(c.shape, tl.float32)
    for i in tl.static_range(TAPS - 1):
        row = (here + i + 1) % TAPS  # of position here - (TAPS - 1 - i)
        x = tl.load(recent + row * C + c, mask=inside, other=0.0)
        total += x * tl.load(conv + i * C + c, mask=inside, other=0.0)
    return total, tl.load(conv + (TAPS - 1) * C + c, mask=inside, other=0.0)


@triton.jit(do_not_specialize_on_alignment=["recent"])
def _conv_step(
    projected, recent, conv, position, status, out, ctx,
    C: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (C / WIDE,)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    c = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = c < C
    here, state = tl.load(position).to(tl.int32), tl.load(status)
    total, weight = past(recent, conv, c, inside, here, TAPS, C)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(projected + c, mask=inside, other=0.0) * tl.load(projected + 2 * C + c, mask=inside, other=0.0)
    behind = tl.load(projected + C + c, mask=inside, other=0.0)
    tl.store(out + striped_index(c, C), behind * (total + x * weight), mask=inside)
    lives = (state == 0) & (here < ctx)  # a step behind the end of an answer leaves everything as it is
    tl.store(recent + here % TAPS * C + c, x, mask=inside & lives)


def conv_step(
    projected: Tensor, w: ConvWeights, recent: Tensor, position: Tensor, status: Tensor, out: Tensor, *,
    ctx: int, pdl: bool = False,
) -> None:  # fmt: skip
    """Mix the token at `position` [1]: projected [3 channels] float32 → out [channels] float32, striped.

    recent [taps, channels] is updated in place, as in kernels.shortconv.conv_mix, unless status [1] is not 0 or the
    position is `ctx`.
    """
    c, taps = w.shape.channels, w.shape.taps
    assert projected.numel() == 3 * c
    assert out.numel() == c
    assert recent.is_contiguous()
    assert recent.shape == w.conv.shape == (taps, c)
    _conv_step[(triton.cdiv(c, WIDE),)](
        projected, recent, w.conv, position, status, out, ctx, C=c, TAPS=taps, WIDE=WIDE, **dependent(pdl)
    )


@triton.jit(do_not_specialize=["tokens", "start"])
def _conv_chunk(
    projected, recent, conv, out, tokens, start, stride,
    C: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (tokens / ROWS, C / WIDE)."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    there = c < C
    inside = (t < tokens)[:, None] & there[None, :]
    y = tl.zeros((ROWS, WIDE), tl.float32)
    for i in tl.static_range(TAPS):
        at = t + (i - TAPS + 1)
        fresh = (at >= 0)[:, None]
        spot = projected + at.to(tl.int64)[:, None] * stride + c[None, :]
        before = tl.load(spot, mask=inside & fresh, other=0.0).to(tl.float32)
        x = tl.load(spot + 2 * C, mask=inside & fresh, other=0.0).to(tl.float32)
        row = (start + at + TAPS) % TAPS
        old = tl.load(recent + row[:, None] * C + c[None, :], mask=inside & (at < 0)[:, None], other=0.0)
        y += tl.where(fresh, before * x, old) * tl.load(conv + i * C + c, mask=there, other=0.0)[None, :]
    t = t.to(tl.int64)[:, None]
    behind = tl.load(projected + t * stride + C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * C + c[None, :], (behind * y).to(out.dtype.element_ty), mask=inside)


def conv_chunk(projected: Tensor, w: ConvWeights, recent: Tensor, start: int) -> Tensor:
    """Mix a prompt's tokens (kernels.shortconv.conv_mix): [T, channels] in the type of `projected` [T, 3 channels]."""
    (taps, c), tokens = w.conv.shape, len(projected)
    assert projected.stride(1) == 1
    assert recent.is_contiguous()
    out = torch.empty((tokens, c), device=projected.device, dtype=projected.dtype)
    _conv_chunk[(triton.cdiv(tokens, ROWS), triton.cdiv(c, WIDE))](
        projected, recent, w.conv, out, tokens, start, projected.stride(0), C=c, TAPS=taps, ROWS=ROWS, WIDE=WIDE
    )
    last = projected[-taps:].float()
    newest(last[:, :c] * last[:, 2 * c :], recent, start + tokens - len(last))
    return out
