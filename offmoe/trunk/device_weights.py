"""What a GPU keeps of every layer's trunk: its weights, still quantised, in the order that kernels read, and how they
come out of a model's files."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from offmoe.kernels.formats import FORMATS, as_it_lies, whole_rows
from offmoe.kernels.mla import Latent
from offmoe.kernels.planes import Matrix, SlotLayout, matrix, rearrange, rearrange_matrix, slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.kernels.recurrent import MixerWeights
from offmoe.kernels.sandwich import Sandwich
from offmoe.kernels.striped import stripe
from offmoe.models.latent import FLOATS, head_rows, rows_of, transposed
from offmoe.models.model import Model
from offmoe.models.recurrent import mixer_output, mixer_weights
from offmoe.trunk.host_trunk import gained, has_head_norm, projections, sandwich, uninterleaved

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
    resident_ffn: Resident | None  # shared experts; where there is no router, the layer's only feed-forward part
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
        parts += [self.resident_ffn.records] if self.resident_ffn else []
        parts += self.mixer.tensors() if self.mixer else []
        parts += self.sandwich.tensors() if self.sandwich else []
        return parts + [value for value in values if isinstance(value, Tensor)]


class DeviceWeights:
    """Reads them, a layer at a time."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model, self.config, self.device = model, model.config, device

    def layer(self, layer: int) -> DeviceLayer:
        c, routed = self.config, layer in self.config.routed
        mixer = c.mixer if layer in c.recurrent else None
        resident_ffn = "dense" if not routed else "shared" if c.shared else None
        return DeviceLayer(
            attn_norm=(attn_norm := self.floats("attn_norm", layer)),
            attn_norm_striped=stripe(attn_norm),
            qkv=self.parts(*projections(c, layer), layer=layer),
            q_norm=self._head_norm("q_norm", layer),
            k_norm=self._head_norm("k_norm", layer),
            o=self.parts(mixer_output(mixer) if mixer else "o", layer=layer),
            ffn_norm=(ffn_norm := self.floats("ffn_norm", layer)),
            ffn_norm_striped=stripe(ffn_norm),
            router=self._router(layer) if routed else None,
            router_bias=self.floats("router_bias", layer) if routed and c.rule.biased else None,
            resident_ffn=self._feed_forward(resident_ffn, layer) if resident_ffn else None,
            attn_norm_bias=(attn_bias := self.floats("attn_norm_bias", layer) if c.norm_bias else None),
            attn_norm_bias_striped=None if attn_bias is None else stripe(attn_bias),
            ffn_norm_bias=(ffn_bias := self.floats("ffn_norm_bias", layer) if c.norm_bias else None),
            ffn_norm_bias_striped=None if ffn_bias is None else stripe(ffn_bias),
            qkv_bias=torch.cat([self.floats(f"{role}_bias", layer) for role in "qkv"]) if c.qkv_bias else None,
            mixer=mixer_weights(self.model, partial(self.floats, layer=layer)) if mixer else None,
            o_bias=self.floats("o_bias", layer) if c.o_bias else None,
            sinks=self.floats("sinks", layer) if c.sinks else None,
            router_offset=self.floats("router_offset", layer) if routed and c.router_offset else None,
            latent=self._latent(layer, c.latent) if c.latent else None,
            sandwich=(norms := sandwich(partial(self.floats, layer=layer)) if c.sandwich else None),
            sandwich_striped=striped(norms) if norms else None,
            router_factors=self.floats("router_factors", layer) if c.rule.scaled else None,
        )

    def floats(self, role: str, layer: int = 0, keep: bool = False) -> Tensor:
        """In float32, or (`keep`) in the float type of the file."""
        info, weight_transform = self.model.stored(role, layer)[0], self.model.weight_transform(role)
        dtype = FLOATS.get(info.format, torch.float32) if keep else torch.float32
        values = self.model.checkpoint.tensor(info.name, dtype)
        return (weight_transform(values) if weight_transform else values).to(self.device)

    def parts(self, *roles: str, layer: int = 0) -> tuple[Part, ...]:
        """The matrices of these roles, one over another, as they lie in the file but for their planes."""
        return self._laid([self._raw(role, layer) for role in roles], self._cols(roles[0], layer))

    def _router(self, layer: int) -> Tensor:
        """With the row of a gated shared expert behind it, in the wider type of both."""
        router = self.floats("router", layer, keep=not self.config.sandwich)
        if self.config.sandwich:
            router = gained(router, self.floats("router_gain", layer))
        if self.config.shared_gated:
            row = self.floats("shared_router", layer, keep=True).view(1, -1)
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
        return Resident(rearrange(record[None], layout).to(self.device), layout)

    def _latent(self, layer: int, z: Latent) -> DeviceLatent:
        heads = self.config.heads
        if self.model.split:
            k_b, v_b = self._raw("k_b", layer), self._raw("v_b", layer)
        else:
            fmt, raw = self._raw("kv_b", layer)
            keys, values = head_rows(raw, heads, z)
            k_b, v_b = transposed(fmt, keys, heads, z), (fmt, values.flatten(0, 1))
        return DeviceLatent(
            q_a_norm=stripe(self.floats("q_a_norm", layer)) if z.q_rank else None,
            q_b=self.parts("q_b", layer=layer) if z.q_rank else (),
            kv_a_norm=self.floats("kv_a_norm", layer),
            k_b=self._laid([k_b], z.qk_nope),
            v_b=self._laid([v_b], z.kv_rank),
        )

    def _head_norm(self, role: str, layer: int) -> Tensor | None:
        if self.config.qk_norm == "unit" and layer not in self.config.no_rope:
            return torch.ones(self.config.head_dim, device=self.device)
        return self.floats(role, layer) if has_head_norm(self.config, layer) else None

    def _laid(self, raw: list[tuple[str, Tensor]], cols: int) -> tuple[Part, ...]:
        """From formats and bytes [rows, row bytes]."""
        parts = []
        for fmt, same in groupby(raw, key=lambda part: part[0]):
            rows = torch.cat([part[1] for part in same])
            form = matrix(fmt, len(rows), cols)
            parts.append((rearrange_matrix(as_it_lies(rows, FORMATS[fmt]), form).to(self.device), form))
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
        info, some = self.model.stored(role, layer)
        form, high = FORMATS[info.format], math.prod(info.shape[:-1])
        # Rows that share scales cannot be moved: in bfloat16, which holds float8's 4 bits. `embed` knows GGUF's only.
        if form.tiled or (role == "embed" and form.gguf_type is None):
            values = self.model.checkpoint.tensor(info.name, torch.bfloat16)
            info = replace(info, format="BF16")
            raw = values.view(torch.uint8).view(high, -1)
        else:
            raw = whole_rows(self.model.checkpoint.read(info.name), form, high)
        raw = raw if some is None else raw[some]
        if role in ("q", "k") and self.model.interleaved:
            heads = self.config.heads_of(layer)
            raw = uninterleaved(raw, heads.heads if role == "q" else heads.kv_heads)
        if (rows := rows_of(role, self.config, striped=True)) is not None:
            raw = raw[rows]
        return info.format, raw


def striped(norms: Sandwich) -> Sandwich:
    """Its weights for the step."""
    return replace(norms, **{name: stripe(w) for name, w in vars(norms).items() if w.numel() > 1})
