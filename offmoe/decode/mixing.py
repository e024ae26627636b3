"""How tokens are mixed in a decode step: a layer's part before its experts.

Norm and qkv → attention, or what a layer without keys mixes by → output. Latent attention is three nodes, or four; a
norm behind the output is one more.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from offmoe.decode.buffers import StepBuffers
from offmoe.kernels.gpu import mla, sandwich
from offmoe.kernels.gpu.attention import decode_attention
from offmoe.kernels.gpu.gemv import dense
from offmoe.kernels.gpu.recurrent import mix_step
from offmoe.kernels.mla import LATENT_EPS
from offmoe.models.config import Heads
from offmoe.trunk.device_trunk import DeviceTrunk, normed_dense
from offmoe.trunk.device_weights import DeviceLatent, DeviceLayer
from offmoe.trunk.kv_cache import KVCache


class MixingStep:
    """Launches of one token over static buffers; `splits`: the context's, and how many positions each has at least."""

    def __init__(
        self, trunk: DeviceTrunk, kv: KVCache, buffers: StepBuffers, splits: Mapping[Heads, tuple[int, int]], pdl: bool
    ) -> None:
        self.config, self.trunk, self.kv, self.buffers = trunk.config, trunk, kv, buffers
        self.splits, self.pdl = splits, pdl

    def launch(self, layer: int) -> None:
        """x += what the layer makes of all tokens."""
        b, c, w = self.buffers, self.config, self.trunk.layers[layer]
        qkv, mixed = self._mixed(w)
        normed_dense(b.x, w.attn_norm_striped, w.attn_norm_bias_striped, c.stream_eps, b.normed, w.qkv, qkv,
                     w.qkv_bias, self.pdl and layer > 0)  # fmt: skip
        if w.mixer:
            states, index = self.kv.state_of(layer)
            mix_step(qkv[0], w.mixer, states.memory[index], states.recent[index], b.position, b.status, mixed[0],
                     ctx=self.kv.ctx, pdl=self.pdl)  # fmt: skip
        elif w.latent:
            self._attend_latents(layer, w.latent)
        else:
            self._attend_heads(layer)
        dense(mixed, w.o, b.given if w.sandwich else b.x, bias=w.o_bias, residual=True, pdl=self.pdl)
        if w.sandwich_striped:
            sandwich.attended(
                b.x, b.given, w.sandwich_striped, c.stream_eps, b.shared_expert_in, b.shared_expert, b.added, self.pdl
            )

    def _mixed(self, w: DeviceLayer) -> tuple[Tensor, Tensor]:
        """As much of the buffers as the layer's two products have rows and columns."""
        rows, cols = sum(form.rows for _, form in w.qkv), w.o[0][1].cols
        return self.buffers.qkv[:, :rows], self.buffers.mixed[:, :cols]

    def _attend_heads(self, layer: int) -> None:
        b, c, w, h = self.buffers, self.config, self.trunk.layers[layer], self.config.heads_of(layer)
        qkv, mixed = self._mixed(w)
        (keys, values), (table, attention_temperature) = self.kv.layer(layer), self.trunk.rope_of(layer)
        splits, split_size = self.splits[h]
        decode_attention(
            qkv[0, c.gate_rows :], keys, values, b.position, table, mixed[0], b.partial, b.attention_tickets,
            heads=h.heads, kv_heads=h.kv_heads, head_dim=h.head_dim, q_norm=w.q_norm, k_norm=w.k_norm,
            norm_full=c.qk_norm == "full", norm_after=c.norm_after, clip=c.clip_qkv, eps=c.norm_eps,
            splits=splits, split_size=split_size, scales=self.kv.scales(layer), scale=c.score_scale,
            window=c.window(layer), chunked=c.chunked, sinks=w.sinks, temperature=attention_temperature,
            value_norm=c.value_norm,
            gate=qkv[0, : c.gate_rows] if c.output_gated else None, pdl=self.pdl,
        )  # fmt: skip

    def _attend_latents(self, layer: int, w: DeviceLatent) -> None:
        """Three launches, four where queries have a latent of their own."""
        b, c, z, h = self.buffers, self.config, self.config.latent, self.config.heads_of(layer)
        assert z is not None, "its weights are there"
        splits, split_size = self.splits[h]
        query = b.qkv
        if w.q_b:
            dense(b.qkv[:, : z.q_rank], w.q_b, b.query, norm=w.q_a_norm, eps=LATENT_EPS, pdl=self.pdl)
            query = b.query
        mla.decode_latents(
            query[0, : c.heads * z.key], b.qkv[0, -z.width :], self.kv.latents(layer), b.position, self.trunk.ropes[h],
            w.kv_a_norm, w.k_b[0], w.v_b[0], b.mixed[0], b.absorbed, b.partial, heads=c.heads, latent=z,
            scale=c.score_scale, splits=splits, split_size=split_size, pdl=self.pdl,
        )  # fmt: skip
