"""Everything but the routed experts: embedding, attention, norms, routers, head; always in fast memory.

The naive twin of DeviceTrunk, in plain torch: what a machine without a GPU uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from offmoe.kernels.attention import attention
from offmoe.kernels.feed_forward import swiglu_experts
from offmoe.kernels.mla import LATENT_EPS, Latent, latent_attention
from offmoe.kernels.norm_rope import rms_norm, rope
from offmoe.kernels.recurrent import MixerWeights
from offmoe.kernels.rope import no_rope_table, rope_table
from offmoe.kernels.route import select
from offmoe.kernels.sandwich import Sandwich
from offmoe.models.config import Heads, ModelConfig
from offmoe.models.latent import head_rows, positioned, rows_of
from offmoe.models.model import Model
from offmoe.models.recurrent import mixer_inputs, mixer_output, mixer_weights
from offmoe.trunk.kv_cache import KVCache


@dataclass(frozen=True)
class LatentWeights:
    """What latent attention has beside; then `qkv` has no keys and values, but latents: see kernels.mla."""

    q_a_norm: Tensor | None  # [q_rank], where queries have a latent; then qkv makes that
    q_b: Tensor | None  # [q_rank, Q]
    kv_a_norm: Tensor  # [L]
    k_b: Tensor  # [heads, L, N]
    v_b: Tensor  # [heads, V, L]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's trunk; H hidden, Q = heads · head_dim, K = kv_heads · head_dim."""

    attn_norm: Tensor  # [H]
    qkv: Tensor  # [H, Q + 2K]
    q_norm: Tensor | None  # [head_dim] or [Q]
    k_norm: Tensor | None
    o: Tensor  # [Q, H]
    ffn_norm: Tensor  # [H]
    router: Tensor | None  # [H, E], where there are experts
    router_bias: Tensor | None  # [E] float32
    resident_ffn: (
        tuple[Tensor, Tensor] | None
    )  # gate beside up [H, 2F], down [F, H]: shared experts, or a dense layer's
    shared_router: Tensor | None  # [H, 1]
    qkv_bias: Tensor | None  # [Q + 2K]
    mixer: MixerWeights | None  # of a layer without keys; then qkv is [H, sum of Mixer.projected] and o [values, H]
    attn_norm_bias: Tensor | None  # [H]
    ffn_norm_bias: Tensor | None  # [H]
    o_bias: Tensor | None  # [H]
    sinks: Tensor | None  # [heads]
    router_offset: Tensor | None  # [E]
    latent: LatentWeights | None
    sandwich: Sandwich | None
    router_factors: Tensor | None  # [E]

    def tensors(self) -> list[Tensor]:
        values = [
            *vars(self).values(),
            *(self.resident_ffn or ()),
            *(vars(self.latent).values() if self.latent else ()),
        ]
        values += self.mixer.tensors() if self.mixer else []
        values += self.sandwich.tensors() if self.sandwich else []
        return [value for value in values if isinstance(value, Tensor)]


class Trunk:
    """The resident weights and what a layer does with T tokens, which follow `start` others in the KV cache."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, ctx: int) -> None:
        self.config = model.config
        self.layers: list[LayerWeights] = []
        self._model, self._device, self._dtype = model, device, dtype
        self._embed = self._load("embed")  # [V, H]
        self._final_norm = self._load("final_norm")
        self._final_norm_bias = self._load("final_norm_bias") if self.config.norm_bias else None
        self._head_bias = self._load("head_bias") if self.config.head_bias else None
        self._head = factor(self._embed if self.config.tied else self._load("head"))  # [H, V]
        if self.config.tied:
            self._embed = self._head.t()
        self._ropes = rope_tables(self.config, ctx, device)
        self._attention_temperature = (
            self.config.attention_temperature.table(ctx, device).to(dtype)
            if self.config.attention_temperature
            else None
        )
        self._positions = torch.arange(ctx, device=device)

    def load_layers(self, progress: Callable[[int, int], None]) -> None:
        """Read the layers one after another; `progress(done, layers)`."""
        for layer in range(self.config.layers):
            self.layers.append(self._load_layer(layer))
            progress(layer + 1, self.config.layers)

    @property
    def nbytes(self) -> int:
        """Bytes held, in the form that is computed with."""
        tensors = [self._embed, self._final_norm] + ([] if self.config.tied else [self._head])
        tensors += [t for weights in self.layers for t in weights.tensors()]
        return sum(t.nbytes for t in tensors)

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids [T] → [T, H]."""
        return F.embedding(tokens, self._embed) * self.config.stream_scale

    def attend(self, layer: int, x: Tensor, kv: KVCache, start: int) -> Tensor:
        """Attention of the residual stream x [T, H], writing its keys and values; returns what to add to x."""
        c, w = self.config, self.layers[layer]
        if w.mixer:
            return self._mix(w, w.mixer, layer, x, kv, start)
        positions = self._positions[start : start + len(x)]
        qkv = rms_norm(x, w.attn_norm, c.stream_eps, w.attn_norm_bias) @ w.qkv
        if w.qkv_bias is not None:
            qkv += w.qkv_bias
        if w.latent:
            return self._attend_latents(layer, w.latent, qkv, kv, positions, kv.bucket(start + len(x))) @ w.o
        h = c.heads_of(layer)
        gate, qkv = qkv.split((c.gate_rows, qkv.shape[1] - c.gate_rows), dim=-1)
        q, k, v = qkv.split((h.queries, h.keys, h.keys), dim=-1)
        if not c.norm_after:
            q, k = self._normed(q, w.q_norm), self._normed(k, w.k_norm)
        q, k, v = self._clipped(q, k, v)
        turned = rope(torch.cat((q, k), dim=-1).unflatten(-1, (-1, h.head_dim)), self._ropes[h], positions)
        q, k = turned.split((h.heads, h.kv_heads), dim=1)
        if c.norm_after:
            q, k = (self._normed(x.flatten(1), w).view_as(x) for x, w in ((q, w.q_norm), (k, w.k_norm)))
        if self._attention_temperature is not None and not h.uses_rope:
            q = q * self._attention_temperature[positions].view(-1, 1, 1)
        if c.value_norm:
            v = rms_norm(v.unflatten(-1, (-1, h.head_dim)), None, c.norm_eps).flatten(1)
        chunk = kv.open(layer, start, len(x))
        places = positions - chunk.first
        chunk.keys.index_copy_(1, places, k.transpose(0, 1))
        chunk.values.index_copy_(1, places, v.unflatten(-1, (-1, h.head_dim)).transpose(0, 1))
        kv.close(layer, chunk, start, len(x))
        keys, values = (cache[:, : kv.bucket(start + len(x) - chunk.first)] for cache in (chunk.keys, chunk.values))
        mixed = attention(q, keys, values, places, c.window(layer), w.sinks, c.score_scale, c.chunked).flatten(1)
        out = (mixed * gate.sigmoid() if c.output_gated else mixed) @ w.o
        out = out if w.o_bias is None else out + w.o_bias
        return rms_norm(out, w.sandwich.attention, c.stream_eps) if w.sandwich else out

    def _mix(self, w: LayerWeights, m: MixerWeights, layer: int, x: Tensor, kv: KVCache, start: int) -> Tensor:
        """The same of a layer without keys: its state goes on."""
        states, index = kv.state_of(layer)
        return states.mix(index, rms_norm(x, w.attn_norm, self.config.stream_eps) @ w.qkv, m, start) @ w.o

    def _attend_latents(
        self, layer: int, w: LatentWeights, qkv: Tensor, kv: KVCache, positions: Tensor, bucket: int
    ) -> Tensor:
        """qkv [T, q_rank or Q, and L + R] → [T, heads · V]."""
        c, z = self.config, self.config.latent
        assert z is not None, "its weights are there"
        query, fresh = qkv.split((qkv.shape[1] - z.width, z.width), dim=1)
        if w.q_b is not None and w.q_a_norm is not None:
            query = rms_norm(query, w.q_a_norm, LATENT_EPS) @ w.q_b
        plain, turned, rows = positioned(
            query, fresh, w.kv_a_norm, self._ropes[c.heads_of(layer)], positions, c.heads, z
        )
        cache = kv.write_latents(layer, rows, positions, bucket)
        return latent_attention(plain, turned, cache, w.k_b, w.v_b, positions, c.score_scale).flatten(1)

    def route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] → the experts' input [T, H], ids [T, k], weights [T, k] float32."""
        w = self.layers[layer]
        assert w.router is not None, f"layer {layer} has experts"
        normed = rms_norm(x, w.ffn_norm, self.config.stream_eps, w.ffn_norm_bias)
        apart = rms_norm(x, None, self.config.stream_eps) if w.sandwich else normed
        logits = apart @ w.router
        if w.router_offset is not None:
            logits = logits + w.router_offset
        ids, weights = select(logits, self.config.rule, w.router_bias, w.router_factors)
        return normed, ids, weights

    def shared(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        """What the shared experts make of the experts' input [T, H], or of x [T, H] by a norm of their own."""
        w, c = self.layers[layer], self.config
        if w.resident_ffn is None:
            return None
        normed = rms_norm(x, w.sandwich.shared_expert_in, c.stream_eps) if w.sandwich else normed
        (out,) = swiglu_experts([normed], [w.resident_ffn], c.glu)
        return out if w.shared_router is None else torch.sigmoid(normed @ w.shared_router) * out

    def dense(self, layer: int, x: Tensor) -> Tensor:
        """The whole feed-forward part of a layer without experts: what to add to x [T, H]."""
        w, c = self.layers[layer], self.config
        assert w.resident_ffn is not None, f"layer {layer} has no experts"
        return swiglu_experts([rms_norm(x, w.ffn_norm, c.stream_eps, w.ffn_norm_bias)], [w.resident_ffn], c.glu)[0]

    def logits(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, V] float32."""
        c = self.config
        logits = (rms_norm(x, self._final_norm, c.stream_eps, self._final_norm_bias) @ self._head).float()
        logits = (logits if self._head_bias is None else logits + self._head_bias) / c.logit_divisor
        return c.logit_cap * torch.tanh(logits / c.logit_cap) if c.logit_cap else logits

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """q or k [T, heads · D]: over each head or over all together, as wide as the weight is."""
        if weight is None:
            return x
        return rms_norm(x.unflatten(-1, (-1, weight.numel())), weight, self.config.norm_eps).flatten(1)

    def _clipped(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        most = self.config.clip_qkv
        return tuple(t.clamp(-most, most) for t in tensors) if most else tensors

    def _load_layer(self, layer: int) -> LayerWeights:
        c, routed = self.config, layer in self.config.routed
        mixer = c.mixer if layer in c.recurrent else None
        resident_ffn = "dense" if not routed else "shared" if c.shared else None
        return LayerWeights(
            attn_norm=self._load("attn_norm", layer),
            qkv=factor(torch.cat([self._load(role, layer) for role in projections(c, layer)])),
            q_norm=self._head_norm("q_norm", layer),
            k_norm=self._head_norm("k_norm", layer),
            o=factor(self._load(mixer_output(mixer) if mixer else "o", layer)),
            ffn_norm=self._load("ffn_norm", layer),
            router=factor(self._router(layer)) if routed else None,
            router_bias=self._load("router_bias", layer, torch.float32) if routed and c.rule.biased else None,
            resident_ffn=self._load_feed_forward(resident_ffn, layer) if resident_ffn else None,
            shared_router=self._load("shared_router", layer).view(-1, 1) if routed and c.shared_gated else None,
            qkv_bias=torch.cat([self._load(f"{r}_bias", layer) for r in "qkv"]) if c.qkv_bias else None,
            mixer=mixer_weights(self._model, partial(self._load, layer=layer, dtype=torch.float32)) if mixer else None,
            o_bias=self._load("o_bias", layer) if c.o_bias else None,
            attn_norm_bias=self._load("attn_norm_bias", layer) if c.norm_bias else None,
            ffn_norm_bias=self._load("ffn_norm_bias", layer) if c.norm_bias else None,
            sinks=self._load("sinks", layer) if c.sinks else None,
            router_offset=self._load("router_offset", layer) if routed and c.router_offset else None,
            latent=self._load_latent(layer, c.latent) if c.latent else None,
            sandwich=sandwich(partial(self._load, layer=layer)) if c.sandwich else None,
            router_factors=self._load("router_factors", layer, torch.float32) if c.rule.scaled else None,
        )

    def _head_norm(self, role: str, layer: int) -> Tensor | None:
        if self.config.qk_norm == "unit" and layer not in self.config.no_rope:
            return torch.ones(self.config.head_dim, device=self._device, dtype=self._dtype)
        return self._load(role, layer) if has_head_norm(self.config, layer) else None

    def _router(self, layer: int) -> Tensor:
        router = self._load("router", layer)
        return gained(router, self._load("router_gain", layer)) if self.config.sandwich else router

    def _load_latent(self, layer: int, z: Latent) -> LatentWeights:
        if self._model.split:
            k_b, v_b = self._load("k_b", layer), self._load("v_b", layer)
        else:
            keys, v_b = head_rows(self._load("kv_b", layer), self.config.heads, z)
            k_b = keys.transpose(1, 2)
        return LatentWeights(
            q_a_norm=self._load("q_a_norm", layer) if z.q_rank else None,
            q_b=factor(self._load("q_b", layer)) if z.q_rank else None,
            kv_a_norm=self._load("kv_a_norm", layer),
            k_b=k_b.contiguous(),
            v_b=v_b.contiguous(),
        )

    def _load_feed_forward(self, kind: str, layer: int) -> tuple[Tensor, Tensor]:
        """Gate beside up [H, 2F], down [F, H]."""
        gate, up, down = (self._load(f"{kind}_{part}", layer) for part in ("gate", "up", "down"))
        return factor(torch.cat((gate, up))), factor(down)

    def _load(self, role: str, layer: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        info, rows = self._model.stored(role, layer)
        dtype, weight_transform = dtype or self._dtype, self._model.weight_transform(role)
        weight = self._model.checkpoint.tensor(info.name, torch.float32 if weight_transform else dtype)
        weight = weight if rows is None else weight[rows]
        weight = weight_transform(weight).to(dtype) if weight_transform else weight
        if role in ("q", "k") and self._model.interleaved:
            heads = self.config.heads_of(layer)
            weight = uninterleaved(weight, heads.heads if role == "q" else heads.kv_heads)
        if (rows := rows_of(role, self.config)) is not None:
            weight = weight[rows]
        return weight.to(self._device)


def has_head_norm(config: ModelConfig, layer: int) -> bool:
    """Whether a layer has weights that q and k are normed by."""
    return config.qk_norm not in ("none", "unit") and layer not in config.recurrent


def sandwich(load: Callable[[str], Tensor]) -> Sandwich:
    return Sandwich(
        load("attn_post_norm"), load("shared_norm"), load("shared_post_norm"), load("routed_post_norm"),
        load("ffn_post_norm"), load("layer_scale"),
    )  # fmt: skip


def gained(router: Tensor, gain: Tensor) -> Tensor:
    """A router [E, H] times the weights [H] of a norm of its own, which divides by √H."""
    return router * gain * router.shape[1] ** -0.5


def rope_tables(config: ModelConfig, ctx: int, device: torch.device) -> dict[Heads, Tensor]:
    """Of every kind of heads."""
    return {
        h: rope_table(ctx, h.rotary, h.rope_theta, device, h.rope) if h.uses_rope else no_rope_table(ctx, device)
        for h in config.kinds_of_heads
    }


def projections(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """The roles whose rows, one under another, take a layer's input in."""
    return mixer_inputs(config.mixer) if config.mixer and layer in config.recurrent else config.projections


def factor(weight: Tensor) -> Tensor:
    """[out, in] as files have it → [in, out] for `x @ w`: MKL then reads 20 GB/s for one vector instead of 11."""
    return weight.t().contiguous()


def uninterleaved(weight: Tensor, heads: int) -> Tensor:
    """[heads · D, H] with the rotated pairs side by side (llama.cpp) → in halves (NEOX)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
