"""The trunk on a GPU: weights stay quantised, the residual stream is float32.

Decoding multiplies them as they are (kernels.gpu.gemv, called by the decode step); a prompt's chunk unpacks one matrix
at a time for torch's product. Shares its interface with Trunk, its naive twin on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from offmoe.kernels.formats import FORMATS, as_it_lies, whole_rows
from offmoe.kernels.keyless import MixerWeights
from offmoe.kernels.mla import HEADS_AT_ONCE, LATENT_EPS, Latent, expand
from offmoe.kernels.norm_rope import rms_norm
from offmoe.kernels.planes import Matrix, SlotLayout, matrix, rearrange, rearrange_matrix, slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.kernels.route import select
from offmoe.kernels.sandwich import Sandwich
from offmoe.kernels.striped import stripe, unstripe
from offmoe.kvcache import KVCache
from offmoe.models.keyless import mixer_output, mixer_weights
from offmoe.models.latent import FLOATS, head_rows, positioned, rows_of, transposed
from offmoe.models.model import Model
from offmoe.models.trunk import gained, has_head_norm, projections, rope_tables, sandwich, uninterleaved

Part = tuple[Tensor, Matrix]  # bytes in slot layout, and what they are


@dataclass(frozen=True)
class Resident:
    """A feed-forward part that every token passes: a record in the only slot of a store, for the same kernels."""

    records: Tensor  # uint8 [1, bytes]
    layout: SlotLayout


@dataclass(frozen=True)
class DeviceLatent:
    """What latent attention has beside; then `qkv` has no keys and values, but latents: see kernels.mla. Rows stand as
    models.latent says."""

    q_a_norm: Tensor | None  # [q_rank], striped, where queries have a latent; then qkv makes that
    q_b: tuple[Part, ...]  # [Q, q_rank]
    kv_a_norm: Tensor  # [L]
    k_b: tuple[Part, ...]  # one, [heads · L, N]
    v_b: tuple[Part, ...]  # one, [heads · V, L]


@dataclass(frozen=True)
class DeviceLayer:
    """One layer's trunk; norms in float32. Striped ones are the step's, see kernels.striped."""

    attn_norm: Tensor  # [H]
    attn_norm_striped: Tensor
    qkv: tuple[Part, ...]  # rows of q, k and v one after another; neighbours of one format are one part
    q_norm: Tensor | None  # [head_dim] or [Q]
    k_norm: Tensor | None
    o: tuple[Part, ...]  # [H, Q]
    ffn_norm: Tensor  # [H]
    ffn_norm_striped: Tensor
    router: Tensor | None  # [E, H] in a float type, striped; behind it the row of a gated shared expert
    router_bias: Tensor | None  # [E]
    beside: Resident | None  # shared experts; where there is no router, the layer's only feed-forward part
    qkv_bias: Tensor | None  # [Q + 2K]
    mixer: MixerWeights | None  # of a layer without keys; then qkv are the rows of Mixer.projected and o is [H, values]
    o_bias: Tensor | None  # [H]
    attn_norm_bias: Tensor | None  # [H], and striped ones
    attn_norm_bias_striped: Tensor | None
    ffn_norm_bias: Tensor | None
    ffn_norm_bias_striped: Tensor | None
    sinks: Tensor | None  # [heads]
    router_offset: Tensor | None  # [E]
    latent: DeviceLatent | None
    sandwich: Sandwich | None
    sandwich_striped: Sandwich | None
    router_factors: Tensor | None  # [E]

    def tensors(self) -> list[Tensor]:
        values = [getattr(part, field.name) for part in (self, self.latent) if part for field in fields(part)]
        parts = [part[0] for value in values if isinstance(value, tuple) for part in value]
        parts += [self.beside.records] if self.beside else []
        parts += self.mixer.tensors() if self.mixer else []
        parts += self.sandwich.tensors() if self.sandwich else []
        return parts + [value for value in values if isinstance(value, Tensor)]


class DeviceTrunk:
    """The resident weights and what a layer does with a chunk of T tokens."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, ctx: int) -> None:
        self.config = model.config
        self.layers: list[DeviceLayer] = []
        self._model, self._device, self._dtype = model, device, dtype
        self.embedding = self._parts("embed")[0]  # [V, H]
        # Only the step and `logits` use these.
        self.final_norm = stripe(self._float("final_norm")) / self.config.logit_divisor
        self.final_norm_bias = self.head_bias = None
        if self.config.norm_bias:
            self.final_norm_bias = stripe(self._float("final_norm_bias")) / self.config.logit_divisor
        if self.config.head_bias:
            self.head_bias = self._float("head_bias") / self.config.logit_divisor
        self.head = (self.embedding,) if self.config.tied else self._parts("head")
        self.ropes = rope_tables(self.config, ctx, device)
        self._temper = self.config.temper.table(ctx, device) if self.config.temper else None
        self._positions = torch.arange(ctx, device=device)

    def rope_of(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """The table that turns a layer's heads, and what its queries are multiplied by then [ctx]."""
        heads = self.config.heads_of(layer)
        return self.ropes[heads], None if heads.turned else self._temper

    def load_layers(self, progress: Callable[[int, int], None]) -> None:
        """Read the layers one after another; `progress(done, layers)`."""
        for layer in range(self.config.layers):
            self.layers.append(self._load_layer(layer))
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
        from offmoe.kernels.gpu.keyless import mix_chunk
        from offmoe.kernels.gpu.norm_rope import norm_rope_write
        from offmoe.kernels.gpu.prefill import prefill_attention

        c, w = self.config, self.layers[layer]
        qkv = self._product(rms_norm(x, w.attn_norm, c.stream_eps, w.attn_norm_bias).to(self._dtype), w.qkv)
        if w.mixer:
            states, index = kv.state_of(layer)
            return self._product(states.mix(index, qkv, w.mixer, start, mix_chunk), w.o)
        if w.qkv_bias is not None:
            qkv += w.qkv_bias
        positions = self._positions[start : start + len(x)]
        if w.latent:
            return self._product(self._attend_latents(w.latent, qkv, kv.latents(layer), positions, start), w.o)
        chunk, h, (table, temper) = kv.open(layer, start, len(x)), c.heads_of(layer), self.rope_of(layer)
        q = norm_rope_write(qkv[:, c.gate_rows :], chunk.keys, chunk.values, positions, table, heads=h.heads,
                            kv_heads=h.kv_heads, head_dim=h.head_dim, q_norm=w.q_norm, k_norm=w.k_norm, clip=c.clip_qkv,
                            eps=c.norm_eps, scales=chunk.scales, first=chunk.first,
                            norm_after=c.norm_after, value_norm=c.value_norm)  # fmt: skip
        if temper is not None:
            q = (q * temper[positions].view(-1, 1, 1)).to(q.dtype)
        kv.close(layer, chunk, start, len(x))
        mixed = prefill_attention(q, chunk.keys, chunk.values, start - chunk.first, chunk.scales,
                                  window=c.window(layer), chunked=c.chunked, sinks=w.sinks,
                                  scale=c.score_scale)  # fmt: skip
        mixed = mixed.flatten(1).to(self._dtype)
        if c.output_gated:
            mixed = mixed * qkv[:, : c.gate_rows].sigmoid()
        out = self._product(mixed, w.o)
        out = out if w.o_bias is None else out + w.o_bias
        return rms_norm(out, w.sandwich.attention, c.stream_eps) if w.sandwich else out

    def _attend_latents(self, w: DeviceLatent, qkv: Tensor, cache: Tensor, positions: Tensor, start: int) -> Tensor:
        """qkv [T, q_rank or Q, and L + R], cache [ctx, L + R] → [T, heads · V]. Keys and values are expanded."""
        from offmoe.kernels.gpu.prefill import prefill_attention

        c, z = self.config, self.config.latent
        assert z is not None, "its weights are there"
        query, fresh = qkv.split((qkv.shape[1] - z.width, z.width), dim=1)
        if w.q_a_norm is not None:
            query = self._product(unstripe(rms_norm(query, w.q_a_norm, LATENT_EPS).to(self._dtype)), w.q_b)
        query = torch.cat((unstripe(query[:, : c.heads * z.plain]), query[:, c.heads * z.plain :]), dim=1)
        plain, turned, rows = positioned(query, fresh, w.kv_a_norm, self.ropes[c.heads_of(0)], positions, c.heads, z)
        end = start + len(rows)
        cache[start:end] = rows
        queries, known = torch.cat((plain, turned), dim=2), cache[:end].to(self._dtype)
        k_b = self._unpacked(w.k_b, z.plain).unflatten(0, (c.heads, -1))
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
        normed = rms_norm(x, w.ffn_norm, self.config.stream_eps, w.ffn_norm_bias)
        apart = rms_norm(x, None, self.config.stream_eps) if w.sandwich else normed
        logits = stripe(apart) @ w.router[: self.config.experts].float().t()
        if w.router_offset is not None:
            logits += w.router_offset
        ids, weights = select(logits, self.config.rule, w.router_bias, w.router_factors)
        return normed.to(self._dtype), ids, weights

    def shared(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        """What the shared experts make of the experts' input [T, H], or of x [T, H] by a norm of their own."""
        w = self.layers[layer]
        if w.beside is None:
            return None
        if w.sandwich:
            normed = rms_norm(x, w.sandwich.beside_in, self.config.stream_eps).to(self._dtype)
        out = self._resident(normed, w.beside)
        if w.router is None or not self.config.shared_gated:
            return out
        return torch.sigmoid(stripe(normed.float()) @ w.router[-1:].float().t()) * out

    def dense(self, layer: int, x: Tensor) -> Tensor:
        """The whole feed-forward part of a layer without experts: what to add to x [T, H]."""
        w = self.layers[layer]
        assert w.beside is not None, f"layer {layer} has no experts"
        return self._resident(
            rms_norm(x, w.ffn_norm, self.config.stream_eps, w.ffn_norm_bias).to(self._dtype), w.beside
        )

    def logits(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, V] float32; T is small."""
        out = torch.empty((len(x), self.config.vocab), device=self._device)
        self.logits_into(stripe(x).contiguous(), torch.empty_like(x), out)
        return out

    def logits_into(self, x: Tensor, normed: Tensor, out: Tensor, pdl: bool = False) -> None:
        """x [T, H] striped → out [T, V]; `normed` [T, H] is scratch."""
        normed_dense(x, self.final_norm, self.final_norm_bias, self.config.stream_eps, normed, self.head, out,
                     self.head_bias, pdl, self.config.logit_cap)  # fmt: skip

    def _resident(self, x: Tensor, part: Resident) -> Tensor:
        gate, up, down = ((part.records[0], form) for form in (part.layout.gate, part.layout.up, part.layout.down))
        return self._product(self.config.glu(self._product(x, (gate,)), self._product(x, (up,))), (down,))

    def _product(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """x [T, K] times the transpose of all rows of `parts`, unpacked for this call: [T, N]."""
        return x @ self._unpacked(parts, x.shape[1]).t()

    def _unpacked(self, parts: Sequence[Part], cols: int) -> Tensor:
        """All rows of `parts` [N, K]."""
        from offmoe.kernels.gpu.unpack import dequantise_into

        weight = torch.empty((sum(part.rows for _, part in parts), cols), device=self._device, dtype=self._dtype)
        at = 0
        for buffer, part in parts:
            dequantise_into(buffer, part, weight[at : at + part.rows])
            at += part.rows
        return weight

    def _load_layer(self, layer: int) -> DeviceLayer:
        c, routed = self.config, layer in self.config.routed
        mixer = c.mixer if layer in c.keyless else None
        beside = "dense" if not routed else "shared" if c.shared else None
        return DeviceLayer(
            attn_norm=(attn_norm := self._float("attn_norm", layer)),
            attn_norm_striped=stripe(attn_norm),
            qkv=self._parts(*projections(c, layer), layer=layer),
            q_norm=self._head_norm("q_norm", layer),
            k_norm=self._head_norm("k_norm", layer),
            o=self._parts(mixer_output(mixer) if mixer else "o", layer=layer),
            ffn_norm=(ffn_norm := self._float("ffn_norm", layer)),
            ffn_norm_striped=stripe(ffn_norm),
            router=self._router(layer) if routed else None,
            router_bias=self._float("router_bias", layer) if routed and c.rule.biased else None,
            beside=self._feed_forward(beside, layer) if beside else None,
            attn_norm_bias=(attn_bias := self._float("attn_norm_bias", layer) if c.norm_bias else None),
            attn_norm_bias_striped=None if attn_bias is None else stripe(attn_bias),
            ffn_norm_bias=(ffn_bias := self._float("ffn_norm_bias", layer) if c.norm_bias else None),
            ffn_norm_bias_striped=None if ffn_bias is None else stripe(ffn_bias),
            qkv_bias=torch.cat([self._float(f"{role}_bias", layer) for role in "qkv"]) if c.qkv_bias else None,
            mixer=mixer_weights(self._model, partial(self._float, layer=layer)) if mixer else None,
            o_bias=self._float("o_bias", layer) if c.o_bias else None,
            sinks=self._float("sinks", layer) if c.sinks else None,
            router_offset=self._float("router_offset", layer) if routed and c.router_offset else None,
            latent=self._load_latent(layer, c.latent) if c.latent else None,
            sandwich=(norms := sandwich(partial(self._float, layer=layer)) if c.sandwich else None),
            sandwich_striped=striped(norms) if norms else None,
            router_factors=self._float("router_factors", layer) if c.rule.scaled else None,
        )

    def _head_norm(self, role: str, layer: int) -> Tensor | None:
        if self.config.qk_norm == "unit" and layer not in self.config.unturned:
            return torch.ones(self.config.head_dim, device=self._device)
        return self._float(role, layer) if has_head_norm(self.config, layer) else None

    def _load_latent(self, layer: int, z: Latent) -> DeviceLatent:
        heads = self.config.heads
        if self._model.split:
            k_b, v_b = self._raw("k_b", layer), self._raw("v_b", layer)
        else:
            fmt, raw = self._raw("kv_b", layer)
            keys, values = head_rows(raw, heads, z)
            k_b, v_b = transposed(fmt, keys, heads, z), (fmt, values.flatten(0, 1))
        return DeviceLatent(
            q_a_norm=stripe(self._float("q_a_norm", layer)) if z.q_rank else None,
            q_b=self._parts("q_b", layer=layer) if z.q_rank else (),
            kv_a_norm=self._float("kv_a_norm", layer),
            k_b=self._laid([k_b], z.plain),
            v_b=self._laid([v_b], z.kv_rank),
        )

    def _router(self, layer: int) -> Tensor:
        """With the row of a gated shared expert behind it, in the wider type of both."""
        router = self._float("router", layer, keep=not self.config.sandwich)
        if self.config.sandwich:
            router = gained(router, self._float("router_gain", layer))
        if self.config.shared_gated:
            row = self._float("shared_router", layer, keep=True).view(1, -1)
            wider = torch.promote_types(router.dtype, row.dtype)
            router = torch.cat((router.to(wider), row.to(wider)))
        return stripe(router).contiguous()

    def _feed_forward(self, kind: str, layer: int) -> Resident:
        """Gate, up and down as a record."""
        h, inner = self.config.hidden, self.config.dense_hidden if kind == "dense" else self.config.shared_hidden
        shapes = {"gate": (inner, h), "up": (inner, h), "down": (h, inner)}
        raw = {name: self._raw(f"{kind}_{name}", layer) for name in shapes}
        layout = slot_layout(RecordLayout.of(*((name, raw[name][0], *shape) for name, shape in shapes.items())))
        record = torch.cat([as_it_lies(rows, FORMATS[fmt]) for fmt, rows in raw.values()])
        return Resident(rearrange(record[None], layout).to(self._device), layout)

    def _float(self, role: str, layer: int = 0, keep: bool = False) -> Tensor:
        """In float32, or (`keep`) in the float type of the file."""
        info, meant = self._model.stored(role, layer)[0], self._model.meant(role)
        dtype = FLOATS.get(info.format, torch.float32) if keep else torch.float32
        values = self._model.checkpoint.tensor(info.name, dtype)
        return (meant(values) if meant else values).to(self._device)

    def _parts(self, *roles: str, layer: int = 0) -> tuple[Part, ...]:
        """The matrices of these roles, one over another, as they lie in the file but for their planes."""
        return self._laid([self._raw(role, layer) for role in roles], self._cols(roles[0], layer))

    def _laid(self, raw: list[tuple[str, Tensor]], cols: int) -> tuple[Part, ...]:
        """From formats and bytes [rows, row bytes]."""
        parts = []
        for fmt, same in groupby(raw, key=lambda part: part[0]):
            rows = torch.cat([part[1] for part in same])
            form = matrix(fmt, len(rows), cols)
            parts.append((rearrange_matrix(as_it_lies(rows, FORMATS[fmt]), form).to(self._device), form))
        return tuple(parts)

    def _cols(self, role: str, layer: int) -> int:
        c = self.config
        if role == "q_b" and c.latent:
            return c.latent.q_rank
        if c.mixer and role == mixer_output(c.mixer):
            return c.mixer.values
        if role != "o":
            return c.hidden
        return c.heads * c.value_dim if c.latent else c.heads_of(layer).queries

    def _raw(self, role: str, layer: int) -> tuple[str, Tensor]:
        """Format and bytes [rows, row bytes] of one matrix; rotated pairs put into halves."""
        info, some = self._model.stored(role, layer)
        form, high = FORMATS[info.format], math.prod(info.shape[:-1])
        # Rows that share scales cannot be moved: in bfloat16, which holds float8's 4 bits. `embed` knows GGUF's only.
        if form.tiled or (role == "embed" and form.gguf_type is None):
            values = self._model.checkpoint.tensor(info.name, torch.bfloat16)
            info = replace(info, format="BF16")
            raw = values.view(torch.uint8).view(high, -1)
        else:
            raw = whole_rows(self._model.checkpoint.read(info.name), form, high)
        raw = raw if some is None else raw[some]
        if role in ("q", "k") and self._model.interleaved:
            heads = self.config.heads_of(layer)
            raw = uninterleaved(raw, heads.heads if role == "q" else heads.kv_heads)
        if (rows := rows_of(role, self.config, striped=True)) is not None:
            raw = raw[rows]
        return info.format, raw


def striped(norms: Sandwich) -> Sandwich:
    """Its weights for the step."""
    return replace(norms, **{name: stripe(w) for name, w in vars(norms).items() if w.numel() > 1})


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
