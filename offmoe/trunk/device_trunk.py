"""The trunk on a GPU: weights stay quantised, the residual stream is float32.

Decoding multiplies them as they are (kernels.gpu.gemv, called by the decode step); a prompt's chunk unpacks one matrix
at a time for torch's product. Shares its interface with Trunk, its naive twin on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from offmoe.kernels.mla import HEADS_AT_ONCE, LATENT_EPS, expand
from offmoe.kernels.norm_rope import rms_norm
from offmoe.kernels.route import select
from offmoe.kernels.striped import stripe, unstripe
from offmoe.models.latent import positioned
from offmoe.models.model import Model
from offmoe.trunk.device_weights import DeviceLatent, DeviceLayer, DeviceWeights, Part, Resident
from offmoe.trunk.host_trunk import rope_tables
from offmoe.trunk.kv_cache import KVCache


class DeviceTrunk:
    """The resident weights and what a layer does with a chunk of T tokens."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, ctx: int) -> None:
        self.config = model.config
        self.layers: list[DeviceLayer] = []
        self._device, self._dtype = device, dtype
        self._weights = weights = DeviceWeights(model, device)
        self.embedding = weights.parts("embed")[0]  # [V, H]
        # Only the step and `logits` use these.
        self.final_norm = stripe(weights.floats("final_norm")) / self.config.logit_divisor
        self.final_norm_bias = self.head_bias = None
        if self.config.norm_bias:
            self.final_norm_bias = stripe(weights.floats("final_norm_bias")) / self.config.logit_divisor
        if self.config.head_bias:
            self.head_bias = weights.floats("head_bias") / self.config.logit_divisor
        self.head = (self.embedding,) if self.config.tied else weights.parts("head")
        self.ropes = rope_tables(self.config, ctx, device)
        self._attention_temperature = (
            self.config.attention_temperature.table(ctx, device) if self.config.attention_temperature else None
        )
        self._positions = torch.arange(ctx, device=device)

    def rope_of(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """The table that turns a layer's heads, and what its queries are multiplied by then [ctx]."""
        heads = self.config.heads_of(layer)
        return self.ropes[heads], None if heads.uses_rope else self._attention_temperature

    def load_layers(self, progress: Callable[[int, int], None]) -> None:
        """Read the layers one after another; `progress(done, layers)`."""
        for layer in range(self.config.layers):
            self.layers.append(self._weights.layer(layer))
            progress(layer + 1, self.config.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads: all but the embedding, where it is not the head too."""
        tensors = [self.final_norm, *(buffer for buffer, _ in self.head)]
        tensors += [tensor for layer in self.layers for tensor in layer.tensors()]
        return sum(tensor.nbytes for tensor in tensors)

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids [T] → [T, H] float32."""
        from offmoe.kernels.gpu.embed import embed

        out = torch.empty((len(tokens), self.config.hidden), device=self._device)
        embed(tokens, self.embedding, out, striped=False, scale=self.config.stream_scale)
        return out

    def attend(self, layer: int, x: Tensor, kv: KVCache, start: int) -> Tensor:
        """Attention of the residual stream x [T, H], writing its keys and values; returns what to add to x."""
        from offmoe.kernels.gpu.norm_rope import norm_rope_write
        from offmoe.kernels.gpu.prefill import prefill_attention
        from offmoe.kernels.gpu.recurrent import mix_chunk

        c, w = self.config, self.layers[layer]
        qkv = self._product(self._normed(x, w.attn_norm, w.attn_norm_bias), w.qkv)
        if w.mixer:
            states, index = kv.state_of(layer)
            return self._product(states.mix(index, qkv, w.mixer, start, mix_chunk), w.o)
        if w.qkv_bias is not None:
            qkv += w.qkv_bias
        positions = self._positions[start : start + len(x)]
        if w.latent:
            return self._product(self._attend_latents(w.latent, qkv, kv.latents(layer), positions, start), w.o)
        chunk, h, (table, attention_temperature) = kv.open(layer, start, len(x)), c.heads_of(layer), self.rope_of(layer)
        q = norm_rope_write(qkv[:, c.gate_rows :], chunk.keys, chunk.values, positions, table, heads=h.heads,
                            kv_heads=h.kv_heads, head_dim=h.head_dim, q_norm=w.q_norm, k_norm=w.k_norm, clip=c.clip_qkv,
                            eps=c.norm_eps, scales=chunk.scales, first=chunk.first,
                            norm_after=c.norm_after, value_norm=c.value_norm)  # fmt: skip
        if attention_temperature is not None:
            q = (q * attention_temperature[positions].view(-1, 1, 1)).to(q.dtype)
        kv.close(layer, chunk, start, len(x))
        mixed = prefill_attention(q, chunk.keys, chunk.values, start - chunk.first, chunk.scales,
                                  window=c.window(layer), chunked=c.chunked, sinks=w.sinks,
                                  scale=c.score_scale)  # fmt: skip
        mixed = mixed.flatten(1).to(self._dtype)
        if c.output_gated:
            mixed = mixed * qkv[:, : c.gate_rows].sigmoid()
        out = self._product(mixed, w.o)
        out = out if w.o_bias is None else out + w.o_bias
        return self._normed(out, w.sandwich.attention, dtype=torch.float32) if w.sandwich else out

    def _attend_latents(self, w: DeviceLatent, qkv: Tensor, cache: Tensor, positions: Tensor, start: int) -> Tensor:
        """qkv [T, q_rank or Q, and L + R], cache [ctx, L + R] → [T, heads · V]. Keys and values are expanded."""
        from offmoe.kernels.gpu.prefill import prefill_attention

        c, z = self.config, self.config.latent
        assert z is not None, "its weights are there"
        query, fresh = qkv.split((qkv.shape[1] - z.width, z.width), dim=1)
        if w.q_a_norm is not None:
            query = self._product(unstripe(self._normed(query.contiguous(), w.q_a_norm, eps=LATENT_EPS)), w.q_b)
        query = torch.cat((unstripe(query[:, : c.heads * z.qk_nope]), query[:, c.heads * z.qk_nope :]), dim=1)
        plain, turned, rows = positioned(query, fresh, w.kv_a_norm, self.ropes[c.heads_of(0)], positions, c.heads, z)
        end = start + len(rows)
        cache[start:end] = rows
        queries, known = torch.cat((plain, turned), dim=2), cache[:end].to(self._dtype)
        k_b = self._unpacked(w.k_b, z.qk_nope).unflatten(0, (c.heads, -1))
        v_b = self._unpacked(w.v_b, z.kv_rank).unflatten(0, (c.heads, -1))
        wide, mixed = max(z.key, z.value), queries.new_empty((len(rows), c.heads, z.value))
        for first in range(0, c.heads, HEADS_AT_ONCE):
            some = slice(first, first + HEADS_AT_ONCE)
            q, keys, values = (
                F.pad(x, (0, wide - x.shape[2])) for x in (queries[:, some], *expand(known, k_b[some], v_b[some]))
            )
            mixed[:, some] = prefill_attention(q, keys, values, start, scale=c.score_scale)[..., : z.value]
        return mixed.flatten(1)

    def route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] → the experts' input [T, H], ids [T, k], weights [T, k] float32."""
        w = self.layers[layer]
        assert w.router is not None, f"layer {layer} has experts"
        normed = self._normed(x, w.ffn_norm, w.ffn_norm_bias, dtype=torch.float32)
        apart = rms_norm(x, None, self.config.stream_eps) if w.sandwich else normed
        logits = stripe(apart) @ w.router[: self.config.experts].float().t()
        if w.router_offset is not None:
            logits += w.router_offset
        ids, weights = select(logits, self.config.rule, w.router_bias, w.router_factors)
        return normed.to(self._dtype), ids, weights

    def shared(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        """What the shared experts make of the experts' input [T, H], or of x [T, H] by a norm of their own."""
        w = self.layers[layer]
        if w.resident_ffn is None:
            return None
        if w.sandwich:
            normed = self._normed(x, w.sandwich.shared_expert_in)
        out = self._resident(normed, w.resident_ffn)
        if w.router is None or not self.config.shared_gated:
            return out
        return torch.sigmoid(stripe(normed.float()) @ w.router[-1:].float().t()) * out

    def dense(self, layer: int, x: Tensor) -> Tensor:
        """The whole feed-forward part of a layer without experts: what to add to x [T, H]."""
        w = self.layers[layer]
        assert w.resident_ffn is not None, f"layer {layer} has no experts"
        return self._resident(self._normed(x, w.ffn_norm, w.ffn_norm_bias), w.resident_ffn)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, V] float32; T is small."""
        out = torch.empty((len(x), self.config.vocab), device=self._device)
        self.logits_into(stripe(x).contiguous(), torch.empty_like(x), out)
        return out

    def logits_into(self, x: Tensor, normed: Tensor, out: Tensor, pdl: bool = False) -> None:
        """x [T, H] striped → out [T, V]; `normed` [T, H] is scratch."""
        normed_dense(x, self.final_norm, self.final_norm_bias, self.config.stream_eps, normed, self.head, out,
                     self.head_bias, pdl, self.config.logit_cap)  # fmt: skip

    def _normed(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """x [T, H] by its RMS norm, or LayerNorm, in one launch where torch's products would be seven."""
        from offmoe.kernels.gpu.norm_rope import rms_norm as norm_into

        out = torch.empty_like(x, dtype=dtype or self._dtype)
        return norm_into(x, weight, self.config.stream_eps if eps is None else eps, out, bias)

    def _resident(self, x: Tensor, part: Resident) -> Tensor:
        gate, up, down = ((part.records[0], form) for form in (part.layout.gate, part.layout.up, part.layout.down))
        return self._product(self.config.glu(self._product(x, (gate,)), self._product(x, (up,))), (down,))

    def _product(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """x [T, K] times the transpose of all rows of `parts`, unpacked for this call: [T, N]."""
        return x @ self._unpacked(parts, x.shape[1]).t()

    def _unpacked(self, parts: Sequence[Part], cols: int) -> Tensor:
        """All rows of `parts` [N, K]."""
        from offmoe.kernels.gpu.formats.unpack import dequantise_into

        weight = torch.empty((sum(part.rows for _, part in parts), cols), device=self._device, dtype=self._dtype)
        at = 0
        for buffer, part in parts:
            dequantise_into(buffer, part, weight[at : at + part.rows])
            at += part.rows
        return weight


def normed_dense(
    x: Tensor, norm: Tensor, shift: Tensor | None, eps: float, normed: Tensor, parts: Sequence[Part], out: Tensor,
    bias: Tensor | None, pdl: bool, cap: float = 0.0,
) -> None:  # fmt: skip
    """kernels.gpu.gemv.dense of x [T, H] behind its norm, which is a launch of its own where it is a LayerNorm."""
    from offmoe.kernels.gpu.gemv import dense
    from offmoe.kernels.gpu.norm_rope import rms_norm as norm_into

    if shift is None:
        dense(x, parts, out, norm=norm, eps=eps, bias=bias, cap=cap, pdl=pdl)
    else:
        norm_into(x, norm, eps, normed, shift)
        dense(normed, parts, out, bias=bias, pdl=pdl)
