"""Attention heads on the CPU, in plain torch: the reference for `device.py`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from offmoe.kernels.attention import attention
from offmoe.kernels.norm_rope import rms_norm, rope
from offmoe.machine.crew import ROWS, share
from offmoe.mixers.heads.cache import Chunk, HeadCache
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.mixers.heads.weights import load_weights
from offmoe.mixers.protocols import Tensors


class Host:
    """Heads of one layer."""

    def __init__(self, config: HeadsConfig, tensors: Tensors) -> None:
        self.config, self.weights = config, load_weights(config, tensors)

    def tensors(self) -> list[Tensor]:
        return self.weights.tensors()

    def mix(self, projected: Tensor, cache: HeadCache, positions: Tensor, start: int) -> Tensor:
        c, w, tokens = self.config, self.weights, len(projected)
        gate, q, k, v = projected.split((c.gate_rows, c.queries, c.keys, c.keys), dim=-1)
        if not c.norm_after:
            q, k = self._normed(q, w.q_norm), self._normed(k, w.k_norm)
        q, k, v = self._clipped(q, k, v)
        rotated = rope(torch.cat((q, k), dim=-1).unflatten(-1, (-1, c.head_dim)), w.rope, positions)
        q, k = rotated.split((c.heads, c.kv_heads), dim=1)
        if c.norm_after:
            q, k = (self._normed(x.flatten(1), norm).view_as(x) for x, norm in ((q, w.q_norm), (k, w.k_norm)))
        if w.temperature is not None:
            q = q * w.temperature[positions].view(-1, 1, 1)
        v = v.unflatten(-1, (-1, c.head_dim))
        v = rms_norm(v, None, c.eps) if c.value_norm else v
        chunk = cache.open(start, tokens)
        at = positions - chunk.first
        chunk.keys.index_copy_(1, at, k.transpose(0, 1))
        chunk.values.index_copy_(1, at, v.transpose(0, 1))
        cache.close(chunk, start, tokens)
        mixed = q.new_empty((tokens, c.heads, c.head_dim))
        share(
            partial(self._attend, q, chunk, cache, start - chunk.first, slice(row, row + ROWS), head, mixed)
            for row in range(0, tokens, ROWS)
            for head in (range(c.kv_heads) if tokens > ROWS else [None])
        )
        mixed = mixed.flatten(1)
        return mixed * gate.sigmoid() if c.gated else mixed

    def _attend(
        self, q: Tensor, chunk: Chunk, cache: HeadCache, start: int, rows: slice, head: int | None, out: Tensor
    ) -> None:
        """Write the output of some rows of q, the first of which is at `start`, and of one key-value head or all."""
        c, group = self.config, self.config.heads // self.config.kv_heads
        mine = slice(None) if head is None else slice(head, head + 1)
        queries = slice(None) if head is None else slice(head * group, head * group + group)
        first, end = start + rows.start, start + min(rows.stop, len(q))
        oldest = 0
        if c.window:
            oldest = first // c.window * c.window if c.chunked else max(0, first - c.window + 1)
        seen = slice(oldest, oldest + cache.bucket(end - oldest))
        at = torch.arange(first - oldest, end - oldest)
        sinks = None if self.weights.sinks is None else self.weights.sinks[queries]
        out[rows, queries] = attention(
            q[rows, queries], chunk.keys[mine, seen], chunk.values[mine, seen], at, c.window, sinks, c.score_scale,
            c.chunked,
        )  # fmt: skip

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """q or k [T, heads · D], normed over each head or over all together, as wide as the weight is."""
        if weight is None:
            return x
        return rms_norm(x.unflatten(-1, (-1, weight.numel())), weight, self.config.eps).flatten(1)

    def _clipped(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        most = self.config.clip
        return tuple(t.clamp(-most, most) for t in tensors) if most else tensors
