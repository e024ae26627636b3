"""The trunk on a GPU: weights stay quantised, the residual stream is float32.

Decoding multiplies them as they are (kernels.gpu.gemv, called by the decode step); a prompt's chunk unpacks one matrix
at a time for torch's product. Shares its interface with Trunk, its naive twin on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from offmoe.kernels.deltanet import DeltaWeights
from offmoe.kernels.norm_rope import rms_norm
from offmoe.kernels.planes import Matrix, SlotLayout, matrix, rearrange, rearrange_matrix, slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.kernels.rope import rope_table
from offmoe.kernels.route import select
from offmoe.kernels.striped import stripe
from offmoe.kvcache import KVCache
from offmoe.models.model import Model
from offmoe.models.trunk import delta_weights, projections, uninterleaved

Part = tuple[Tensor, Matrix]  # bytes in slot layout, and what they are
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Resident:
    """A feed-forward part that every token passes: a record in the only slot of a store, for the same kernels."""

    records: Tensor  # uint8 [1, bytes]
    layout: SlotLayout


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
    delta: DeltaWeights | None  # of a layer without keys; then qkv are the rows of Delta.projected and o is [H, values]

    def tensors(self) -> list[Tensor]:
        values = [getattr(self, field.name) for field in fields(self)]
        parts = [part[0] for value in values if isinstance(value, tuple) for part in value]
        parts += [self.beside.records] if self.beside else []
        parts += self.delta.tensors() if self.delta else []
        return parts + [value for value in values if isinstance(value, Tensor)]


class DeviceTrunk:
    """The resident weights and what a layer does with a chunk of T tokens."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, ctx: int) -> None:
        self.config = model.config
        self.layers: list[DeviceLayer] = []
        self._model, self._device, self._dtype = model, device, dtype
        self.embedding = self._parts("embed")[0]  # [V, H]
        self.final_norm = (
            stripe(self._float("final_norm")) / self.config.logit_divisor
        )  # only the step and `logits` use it
        self.head = (self.embedding,) if self.config.tied else self._parts("head")
        self.rope = rope_table(ctx, self.config.rotary, self.config.rope_theta, device, self.config.rope)
        self._positions = torch.arange(ctx, device=device)

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
        from offmoe.kernels.gpu.attention import prefill_attention
        from offmoe.kernels.gpu.deltanet import delta_chunk
        from offmoe.kernels.gpu.norm_rope import norm_rope_write

        c, w = self.config, self.layers[layer]
        qkv = self._product(rms_norm(x, w.attn_norm, c.stream_eps).to(self._dtype), w.qkv)
        if w.delta:
            states, index = kv.state_of(layer)
            return self._product(states.mix(index, qkv, w.delta, start, delta_chunk), w.o)
        if w.qkv_bias is not None:
            qkv += w.qkv_bias
        keys, values = kv.layer(layer)
        positions = self._positions[start : start + len(x)]
        q = norm_rope_write(qkv[:, c.gate_rows :], keys, values, positions, self.rope, heads=c.heads,
                            kv_heads=c.kv_heads, head_dim=c.head_dim, q_norm=w.q_norm, k_norm=w.k_norm,
                            clip=c.clip_qkv, eps=c.norm_eps, scales=kv.scales(layer),
                            norm_after=c.qk_norm == "after")  # fmt: skip
        mixed = prefill_attention(q, keys, values, start, scales=kv.scales(layer), scale=c.score_scale).flatten(1)
        return self._product(mixed * qkv[:, : c.gate_rows].sigmoid() if c.output_gated else mixed, w.o)

    def route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] → the experts' input [T, H], ids [T, k], weights [T, k] float32."""
        w = self.layers[layer]
        assert w.router is not None, f"layer {layer} has experts"
        normed = rms_norm(x, w.ffn_norm, self.config.stream_eps)
        logits = stripe(normed) @ w.router[: self.config.experts].float().t()
        ids, weights = select(logits, self.config.rule, w.router_bias)
        return normed.to(self._dtype), ids, weights

    def shared(self, layer: int, normed: Tensor) -> Tensor | None:
        """What the shared experts make of the experts' input [T, H]."""
        w = self.layers[layer]
        if w.beside is None:
            return None
        out = self._resident(normed, w.beside)
        if w.router is None or not self.config.shared_gated:
            return out
        return torch.sigmoid(stripe(normed.float()) @ w.router[-1:].float().t()) * out

    def dense(self, layer: int, x: Tensor) -> Tensor:
        """The whole feed-forward part of a layer without experts: what to add to x [T, H]."""
        w = self.layers[layer]
        assert w.beside is not None, f"layer {layer} has no experts"
        return self._resident(rms_norm(x, w.ffn_norm, self.config.stream_eps).to(self._dtype), w.beside)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, V] float32; T is small."""
        from offmoe.kernels.gpu.gemv import dense

        out = torch.empty((len(x), self.config.vocab), device=self._device)
        dense(stripe(x).contiguous(), self.head, out, norm=self.final_norm, eps=self.config.stream_eps)
        return out

    def _resident(self, x: Tensor, part: Resident) -> Tensor:
        gate, up, down = ((part.records[0], form) for form in (part.layout.gate, part.layout.up, part.layout.down))
        return self._product(F.silu(self._product(x, (gate,))) * self._product(x, (up,)), (down,))

    def _product(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """x [T, K] times the transpose of all rows of `parts`, unpacked for this call: [T, N]."""
        from offmoe.kernels.gpu.unpack import dequantise_into

        rows = sum(part.rows for _, part in parts)
        weight = torch.empty((rows, x.shape[1]), device=x.device, dtype=x.dtype)
        at = 0
        for buffer, part in parts:
            dequantise_into(buffer, part, weight[at : at + part.rows])
            at += part.rows
        return x @ weight.t()

    def _load_layer(self, layer: int) -> DeviceLayer:
        c, routed = self.config, layer in self.config.routed
        linear = layer in c.delta_layers
        normed = c.qk_norm != "none" and not linear
        beside = "dense" if not routed else "shared" if c.shared else None
        return DeviceLayer(
            attn_norm=(attn_norm := self._float("attn_norm", layer)),
            attn_norm_striped=stripe(attn_norm),
            qkv=self._parts(*projections(c, layer), layer=layer),
            q_norm=self._float("q_norm", layer) if normed else None,
            k_norm=self._float("k_norm", layer) if normed else None,
            o=self._parts("delta_o" if linear else "o", layer=layer),
            ffn_norm=(ffn_norm := self._float("ffn_norm", layer)),
            ffn_norm_striped=stripe(ffn_norm),
            router=self._router(layer) if routed else None,
            router_bias=self._float("router_bias", layer) if routed and c.rule.biased else None,
            beside=self._feed_forward(beside, layer) if beside else None,
            qkv_bias=torch.cat([self._float(f"{role}_bias", layer) for role in "qkv"]) if c.qkv_bias else None,
            delta=delta_weights(self._model, partial(self._float, layer=layer)) if linear else None,
        )

    def _router(self, layer: int) -> Tensor:
        """With the row of a gated shared expert behind it, in the wider type of both."""
        router = self._float("router", layer, keep=True)
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
        record = torch.cat([matrix.flatten() for _, matrix in raw.values()])
        return Resident(rearrange(record[None], layout).to(self._device), layout)

    def _float(self, role: str, layer: int = 0, keep: bool = False) -> Tensor:
        """In float32, or (`keep`) in the float type of the file."""
        info, meant = self._model.stored(role, layer)[0], self._model.meant(role)
        dtype = FLOATS.get(info.format, torch.float32) if keep else torch.float32
        values = self._model.checkpoint.tensor(info.name, dtype)
        return (meant(values) if meant else values).to(self._device)

    def _parts(self, *roles: str, layer: int = 0) -> tuple[Part, ...]:
        """The matrices of these roles, one over another, as they lie in the file but for their planes."""
        raw = [self._raw(role, layer) for role in roles]
        parts = []
        for fmt, same in groupby(raw, key=lambda part: part[0]):
            rows = torch.cat([part[1] for part in same])
            form = matrix(fmt, len(rows), self._cols(roles[0]))
            parts.append((rearrange_matrix(rows.flatten(), form).to(self._device), form))
        return tuple(parts)

    def _cols(self, role: str) -> int:
        if role == "delta_o":
            assert self.config.delta
            return self.config.delta.values
        return self.config.heads * self.config.head_dim if role == "o" else self.config.hidden

    def _raw(self, role: str, layer: int) -> tuple[str, Tensor]:
        """Format and bytes [rows, row bytes] of one matrix; rotated pairs put into halves."""
        info, rows = self._model.stored(role, layer)
        raw = self._model.checkpoint.read(info.name).view(math.prod(info.shape[:-1]), -1)
        raw = raw if rows is None else raw[rows]
        if role in ("q", "k") and self._model.interleaved:
            raw = uninterleaved(raw, self.config.heads if role == "q" else self.config.kv_heads)
        return info.format, raw
