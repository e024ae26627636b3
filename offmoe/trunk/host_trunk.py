"""The trunk on the CPU: embedding, mixers, norms, routers, shared experts and output head, always in fast memory.

Plain torch: the reference for DeviceTrunk, and what a machine without a GPU runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from offmoe.kernels.norm_rope import rms_norm
from offmoe.kernels.route import select
from offmoe.machine.crew import product
from offmoe.models.model import Model
from offmoe.trunk.host_weights import HostWeights, LayerWeights, factor
from offmoe.trunk.kv_cache import KVCache


class Trunk:
    """Resident weights, and a layer's parts for T tokens that follow `start` others in the KV cache."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, ctx: int) -> None:
        self.config = c = model.config
        self.layers: list[LayerWeights] = []
        self._weights = weights = HostWeights(model, device, dtype, ctx)
        self._embed = weights.load("embed")  # [V, H]
        self._final_norm = weights.load("final_norm")
        self._final_norm_bias = weights.load("final_norm_bias") if c.norm.bias else None
        self._head_bias = weights.load("head_bias") if c.stream.head_bias else None
        self._head = factor(self._embed if c.stream.tied else weights.load("head"))  # [H, V]
        if c.stream.tied:
            self._embed = self._head.t()
        self._positions = torch.arange(ctx, device=device)

    def load_layers(self, progress: Callable[[int, int], None]) -> None:
        """Read the layers one after another; `progress(done, layers)`."""
        for layer in range(self.config.layers):
            self.layers.append(self._weights.layer(layer))
            progress(layer + 1, self.config.layers)

    @property
    def nbytes(self) -> int:
        """Bytes held, in the form that is computed with."""
        tensors = [self._embed, self._final_norm] + ([] if self.config.stream.tied else [self._head])
        tensors += [tensor for weights in self.layers for tensor in weights.tensors()]
        return sum(tensor.nbytes for tensor in tensors)

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids [T] → [T, H]."""
        return F.embedding(tokens, self._embed) * self.config.stream_scale

    def attend(self, layer: int, x: Tensor, kv: KVCache, start: int) -> Tensor:
        """Run the mixer of `layer` over the residual stream x [T, H]; return what to add to x."""
        w, eps = self.layers[layer], self.config.stream_eps
        projected = product(rms_norm(x, w.attn_norm, eps, w.attn_norm_bias), w.in_proj)
        if w.in_bias is not None:
            projected += w.in_bias
        positions = self._positions[start : start + len(x)]
        out = product(w.mixer.mix(projected, kv.caches[layer], positions, start), w.out_proj)
        out = out if w.out_bias is None else out + w.out_bias
        return rms_norm(out, w.sandwich.attention, eps) if w.sandwich else out

    def route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] → the experts' input [T, H], ids [T, k], weights [T, k] float32."""
        w, eps = self.layers[layer], self.config.stream_eps
        assert w.router is not None, f"layer {layer} has experts"
        normed = rms_norm(x, w.ffn_norm, eps, w.ffn_norm_bias)
        logits = (rms_norm(x, None, eps) if w.sandwich else normed) @ w.router
        if w.router_offset is not None:
            logits = logits + w.router_offset
        ids, weights = select(logits, self.config.moe.rule, w.router_bias, w.router_factors)
        return normed, ids, weights

    def shared(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        """Output of the shared experts, from the experts' input [T, H], or from x [T, H] where they have a norm."""
        w, c = self.layers[layer], self.config
        if w.resident_ffn is None:
            return None
        normed = rms_norm(x, w.sandwich.shared_expert_in, c.stream_eps) if w.sandwich else normed
        out = self._resident(normed, w.resident_ffn)
        return out if w.shared_router is None else torch.sigmoid(normed @ w.shared_router) * out

    def dense(self, layer: int, x: Tensor) -> Tensor:
        """Output of the feed-forward part of a layer without experts: what to add to x [T, H]."""
        w, c = self.layers[layer], self.config
        assert w.resident_ffn is not None, f"layer {layer} has no experts"
        normed = rms_norm(x, w.ffn_norm, c.stream_eps, w.ffn_norm_bias)
        return self._resident(normed, w.resident_ffn)

    def _resident(self, x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        gate, up = product(x, weights[0]).chunk(2, dim=-1)
        return product(self.config.moe.glu(gate, up), weights[1])

    def logits(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, V] float32."""
        eps, stream = self.config.stream_eps, self.config.stream
        logits = (rms_norm(x, self._final_norm, eps, self._final_norm_bias) @ self._head).float()
        logits = (logits if self._head_bias is None else logits + self._head_bias) / stream.logit_divisor
        return stream.logit_cap * torch.tanh(logits / stream.logit_cap) if stream.logit_cap else logits
