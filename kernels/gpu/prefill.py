"""Attention of a prompt's chunk: torch's kernels, and a Triton kernel for windows and sinks, which torch lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.attention import LOG2E, LOG_2_E, dot_type, oldest_seen
from offmoe.kernels.kv import KEYS, dequantise
from offmoe.kernels.row_blocks import row_blocks


@triton.jit(do_not_specialize=["tokens", "past"])
def _prefill(
    q, keys, values, sinks, out, tokens, past, head_stride, to_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (tokens / M, HEADS): attention with windows and sinks."""
    head, d = tl.program_id(1), tl.arange(0, WIDE)
    t = tl.program_id(0) * M + tl.arange(0, M)
    here = past + t
    at = (t.to(tl.int64) * HEADS + head)[:, None] * D + d[None, :]
    inside = (t < tokens)[:, None] & (d < D)[None, :]
    query = tl.load(q + at, mask=inside, other=0.0).to(DOT)
    line = (head // GROUP).to(tl.int64) * head_stride
    if sinks is not None:
        top = tl.load(sinks + head) * LOG_2_E + tl.zeros((M,), tl.float32)
        total = tl.full((M,), 1.0, tl.float32)
    else:
        top = tl.full((M,), -1e30, tl.float32)  # finite: a row may see nothing of a block
        total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, WIDE), tl.float32)
    first = tl.program_id(0) * M + past
    end = tl.minimum(first + M, past + tokens)
    begin = oldest_seen(first, WINDOW, CHUNKED) // N * N
    for start in range(begin, end, N):
        n = start + tl.arange(0, N)
        source = line + n.to(tl.int64)[:, None] * D + d[None, :]
        there = (n < end)[:, None] & (d < D)[None, :]
        scores = tl.dot(query, tl.trans(tl.load(keys + source, mask=there, other=0.0)), input_precision="ieee")
        seen = n[None, :] <= here[:, None]
        if WINDOW > 0:
            seen = seen & (n[None, :] >= oldest_seen(here, WINDOW, CHUNKED)[:, None])
        scores = tl.where(seen, scores * to_log2, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        old, p = tl.exp2(top - higher), tl.exp2(scores - higher[:, None])
        total = total * old + tl.sum(p, 1)
        value = tl.load(values + source, mask=there, other=0.0)
        mixed = tl.dot(p.to(DOT), value, mixed * old[:, None], input_precision="ieee")
        top = higher
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, start: int, scales: Tensor | None = None, *,
    window: int = 0, chunked: bool = False, sinks: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend from q [T, heads, D] at positions start … over keys, values [kv_heads, room, D]: [T, heads, D].

    Attention is causal. No [T, start + T] mask is made on a GPU. int8 keys and values are unpacked first, in q's type.
    `window`, `chunked` and `sinks` [heads] float32 as in kernels.attention. torch has no flash attention for heads
    wider than 256. What computes a row depends on its block of rows (kernels.row_blocks), not on T.
    """
    k, v = keys[:, : start + len(q)], values[:, : start + len(q)]
    if scales is not None:
        k, v = (dequantise(x, scale[:, : k.shape[1]], q.dtype) for x, scale in zip((k, v), scales, strict=True))
    out = torch.empty_like(q)
    for rows in row_blocks(len(q)):
        first, end = start + rows.start, start + rows.stop
        if (0 < window < end) or sinks is not None or q.shape[2] > 256 or (first and not flash(q)):
            # One launch for all further blocks, whose ends are further on: its tiles of rows are the same in each.
            seen_through_windows(q[rows.start :], k, v, first, window, chunked, sinks, scale, out[rows.start :])
            break
        out[rows] = seen_whole(q[rows], k[:, :end], v[:, :end], first, scale)
    return out


def seen_whole(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float | None) -> Tensor:
    """Compute `prefill_attention` without windows and sinks by torch's kernels."""
    q, k, v = q.transpose(0, 1).unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if start:  # torch.nn.attention.bias, the door to this, imports torch's compiler, for 4 s
        mixed = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]
    else:
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1], scale=scale
        )
    return mixed.squeeze(0).transpose(0, 1)


def flash(q: Tensor) -> bool:
    """Return whether torch has flash attention for q [T, heads, D], whose last row sees the last key."""
    there = q.device.type == "cuda" and torch.backends.cuda.is_flash_attention_available()
    return there and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0


def seen_through_windows(
    q: Tensor, k: Tensor, v: Tensor, start: int, window: int, chunked: bool, sinks: Tensor | None, scale: float | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Compute `prefill_attention` with the Triton kernel, into `out`.

    A row's bits depend on where its tiles of keys begin, hence on the position of the first key modulo KEYS, and not on
    the other rows.
    """
    tokens, heads, d = q.shape
    assert q.is_contiguous()
    assert k.stride() == v.stride()
    assert k.stride()[1:] == (d, 1)
    wide, scale = triton.next_power_of_2(d), d**-0.5 if scale is None else scale
    # A tile of queries and two of keys and values, in the 99 KB that a desktop card's multiprocessor has.
    m, n = (16, 32) if q.dtype == torch.float32 else (128, 64) if wide <= 128 else (64, 32) if wide == 256 else (32, 16)
    assert KEYS % n == 0, "a cache's first key is at a multiple of KEYS"
    _prefill[(triton.cdiv(tokens, m), heads)](
        q, k, v, sinks, out, tokens, start, k.stride(0), scale * LOG2E, HEADS=heads, GROUP=heads // len(k), D=d,
        WIDE=wide, WINDOW=window, CHUNKED=chunked, M=m, N=n, DOT=dot_type(k), num_warps=4 if d <= 64 else 8,
        num_stages=3 if wide <= 128 else 2,
    )  # fmt: skip
