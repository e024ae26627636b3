"""Attention heads on a GPU: a prompt's chunk in two launches, a token of the decode step in one."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.gpu import attention, norm_rope, prefill
from offmoe.mixers.heads.cache import HeadCache
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.mixers.heads.weights import load_weights
from offmoe.mixers.protocols import DeviceTensors, Scratch, StepTensors


class Device:
    """Heads of one layer."""

    def __init__(self, config: HeadsConfig, tensors: DeviceTensors) -> None:
        self.config, self.weights = config, load_weights(config, tensors)

    def tensors(self) -> list[Tensor]:
        return self.weights.tensors()

    def mix(self, projected: Tensor, cache: HeadCache, positions: Tensor, start: int) -> Tensor:
        c, w, tokens = self.config, self.weights, len(projected)
        chunk = cache.open(start, tokens)
        q = norm_rope.norm_rope_write(
            projected[:, c.gate_rows :], chunk.keys, chunk.values, positions, w.rope, heads=c.heads,
            kv_heads=c.kv_heads, head_dim=c.head_dim, q_norm=w.q_norm, k_norm=w.k_norm, clip=c.clip, eps=c.eps,
            scales=chunk.scales, first=chunk.first, norm_after=c.norm_after, value_norm=c.value_norm,
        )  # fmt: skip
        if w.temperature is not None:
            q = (q * w.temperature[positions].view(-1, 1, 1)).to(q.dtype)
        cache.close(chunk, start, tokens)
        mixed = prefill.prefill_attention(
            q, chunk.keys, chunk.values, start - chunk.first, chunk.scales, window=c.window, chunked=c.chunked,
            sinks=w.sinks, scale=c.score_scale,
        )  # fmt: skip
        mixed = mixed.flatten(1).to(projected.dtype)
        return mixed * projected[:, : c.gate_rows].sigmoid() if c.gated else mixed

    def scratch(self, ctx: int, sms: int, device: torch.device) -> Scratch:
        c = self.config
        splits, _ = attention.pick_splits(ctx, c.kv_heads, sms)
        partial = attention.partial_size(c.heads, c.head_dim, splits)
        return {"partial": (partial, torch.float32), "tickets": (c.kv_heads, torch.int32)}

    def launch(self, projected: Tensor, mixed: Tensor, cache: HeadCache, step: StepTensors) -> None:
        c, w = self.config, self.weights
        splits, split_size = attention.pick_splits(step.ctx, c.kv_heads, step.sms)
        attention.decode_attention(
            projected[0, c.gate_rows :], cache.keys, cache.values, step.position, w.rope, mixed[0],
            step.scratch["partial"], step.scratch["tickets"], heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim,
            q_norm=w.q_norm, k_norm=w.k_norm, norm_full=c.qk_norm == "full", norm_after=c.norm_after, clip=c.clip,
            eps=c.eps, splits=splits, split_size=split_size, scales=cache.scales, scale=c.score_scale,
            window=c.window, chunked=c.chunked, sinks=w.sinks, temperature=w.temperature, value_norm=c.value_norm,
            gate=projected[0, : c.gate_rows] if c.gated else None, pdl=step.pdl,
        )  # fmt: skip
