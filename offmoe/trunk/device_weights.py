"""Weights of the trunk on a GPU: still quantised, in the order that kernels read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import groupby

import torch
from torch import Tensor

from offmoe.kernels.formats import FORMATS, as_it_lies, whole_rows
from offmoe.kernels.planes import SlotLayout, matrix, rearrange, rearrange_matrix, slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.kernels.sandwich import Sandwich
from offmoe.kernels.striped import stripe
from offmoe.mixers.latent.rows import FLOATS
from offmoe.mixers.protocols import DeviceMixer, Part
from offmoe.mixers.registry import device_mixer
from offmoe.mixers.rope import RopeTables
from offmoe.models.model import Model
from offmoe.trunk.host_weights import gained, sandwich


@dataclass(frozen=True)
class Resident:
    """A feed-forward part that every token passes: a record in the only slot of a store, for the experts' kernels."""

    records: Tensor  # uint8 [1, bytes]
    layout: SlotLayout


@dataclass(frozen=True)
class DeviceLayer:
    """One layer's trunk. Letters as in mixers.base; norms in float32; striped ones (kernels.striped) for the step."""

    attn_norm: Tensor  # [H]
    attn_norm_striped: Tensor
    attn_norm_bias: Tensor | None  # [H]
    attn_norm_bias_striped: Tensor | None
    in_proj: tuple[Part, ...]  # [P, H]
    in_bias: Tensor | None  # [P]
    mixer: DeviceMixer
    out_proj: tuple[Part, ...]  # [H, M]
    out_bias: Tensor | None  # [H]
    ffn_norm: Tensor  # [H]
    ffn_norm_striped: Tensor
    ffn_norm_bias: Tensor | None
    ffn_norm_bias_striped: Tensor | None
    router: Tensor | None  # [E, H] in a float type, striped; then the row of a gated shared expert
    router_bias: Tensor | None  # [E]
    router_offset: Tensor | None  # [E]
    router_factors: Tensor | None  # [E]
    resident_ffn: Resident | None  # shared experts; without a router, the layer's only feed-forward part
    sandwich: Sandwich | None
    sandwich_striped: Sandwich | None

    def tensors(self) -> list[Tensor]:
        values = [getattr(self, field.name) for field in fields(self)]
        parts = [part[0] for value in values if isinstance(value, tuple) for part in value]
        parts += [self.resident_ffn.records] if self.resident_ffn else []
        parts += self.sandwich.tensors() if self.sandwich else []
        return [*parts, *self.mixer.tensors(), *(value for value in values if isinstance(value, Tensor))]


class DeviceWeights:
    """Reads a model's trunk, one layer at a time."""

    def __init__(self, model: Model, device: torch.device, ctx: int) -> None:
        self.model, self.config, self.device, self.ropes = model, model.config, device, RopeTables(ctx, device)

    def layer(self, layer: int) -> DeviceLayer:
        c, moe, mixer = self.config, self.config.moe, self.config.mixers[layer]
        routed, tensors = layer in moe.routed, LayerTensors(self, layer)
        load = tensors.load
        resident_ffn = "dense" if not routed else "shared" if moe.shared else None
        return DeviceLayer(
            attn_norm=(attn_norm := load("attn_norm")),
            attn_norm_striped=stripe(attn_norm),
            attn_norm_bias=(attn_bias := load("attn_norm_bias") if c.norm.bias else None),
            attn_norm_bias_striped=None if attn_bias is None else stripe(attn_bias),
            in_proj=tensors.parts(*mixer.in_proj, cols=c.hidden),
            in_bias=torch.cat([load(role) for role in mixer.in_bias]) if mixer.in_bias else None,
            mixer=device_mixer(mixer, tensors),
            out_proj=tensors.parts(mixer.out_proj, cols=mixer.mixed),
            out_bias=load(mixer.out_bias) if mixer.out_bias else None,
            ffn_norm=(ffn_norm := load("ffn_norm")),
            ffn_norm_striped=stripe(ffn_norm),
            ffn_norm_bias=(ffn_bias := load("ffn_norm_bias") if c.norm.bias else None),
            ffn_norm_bias_striped=None if ffn_bias is None else stripe(ffn_bias),
            router=self._router(layer) if routed else None,
            router_bias=load("router_bias") if routed and moe.rule.biased else None,
            router_offset=load("router_offset") if routed and moe.router_offset else None,
            router_factors=load("router_factors") if routed and moe.rule.scaled else None,
            resident_ffn=self._feed_forward(resident_ffn, layer) if resident_ffn else None,
            sandwich=(norms := sandwich(load) if c.norm.sandwich else None),
            sandwich_striped=striped(norms) if norms else None,
        )

    def floats(self, role: str, layer: int = 0, keep: bool = False) -> Tensor:
        """The tensor of `role` in float32, or (`keep`) in the float type of the file."""
        info, weight_transform = self.model.stored(role, layer)[0], self.model.weight_transform(role)
        dtype = FLOATS.get(info.format, torch.float32) if keep else torch.float32
        values = self.model.checkpoint.tensor(info.name, dtype)
        return (weight_transform(values) if weight_transform else values).to(self.device)

    def parts(self, *roles: str, cols: int, layer: int = 0) -> tuple[Part, ...]:
        """Matrices [rows, cols] of these roles, one over another; neighbours of one format are one part."""
        raw = [self.raw(role, layer) for role in roles]
        return tuple(
            self.in_slots(fmt, torch.cat([rows for _, rows in same]), cols)
            for fmt, same in groupby(raw, key=lambda part: part[0])
        )

    def in_slots(self, fmt: str, raw: Tensor, cols: int) -> Part:
        """Bytes [rows, row bytes] in slot layout."""
        form = matrix(fmt, len(raw), cols)
        return rearrange_matrix(as_it_lies(raw, FORMATS[fmt]), form).to(self.device), form

    def raw(self, role: str, layer: int) -> tuple[str, Tensor]:
        """Format and bytes [rows, row bytes] of one matrix, rows in the order in which they are computed with."""
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
        order = self.config.mixers[layer].row_order(role, self.model.interleaved, striped=True)
        return info.format, raw if order is None else raw[order]

    def _router(self, layer: int) -> Tensor:
        """The router, then the row of a gated shared expert, in the wider type of both."""
        router = self.floats("router", layer, keep=not self.config.norm.sandwich)
        if self.config.norm.sandwich:
            router = gained(router, self.floats("router_gain", layer))
        if self.config.moe.shared_gated:
            row = self.floats("shared_router", layer, keep=True).view(1, -1)
            wider = torch.promote_types(router.dtype, row.dtype)
            router = torch.cat((router.to(wider), row.to(wider)))
        return stripe(router).contiguous()

    def _feed_forward(self, kind: str, layer: int) -> Resident:
        """Gate, up and down as a record; kind: dense or shared."""
        h, moe = self.config.hidden, self.config.moe
        inner = moe.dense_hidden if kind == "dense" else moe.shared_hidden
        shapes = {"gate": (inner, h), "up": (inner, h), "down": (h, inner)}
        raw = {name: self.raw(f"{kind}_{name}", layer) for name in shapes}
        layout = slot_layout(RecordLayout.of(*((name, raw[name][0], *shape) for name, shape in shapes.items())))
        record = torch.cat([as_it_lies(rows, FORMATS[fmt]) for fmt, rows in raw.values()])
        return Resident(rearrange(record[None], layout).to(self.device), layout)


class LayerTensors:
    """Tensors of one layer by role (mixers.protocols.DeviceTensors)."""

    dtype = torch.float32

    def __init__(self, weights: DeviceWeights, layer: int) -> None:
        self.ropes, self.device, self.tiled = weights.ropes, weights.device, weights.model.tiled
        self._weights, self._layer = weights, layer

    def has(self, role: str) -> bool:
        return self._weights.model.find(role, self._layer) is not None

    def load(self, role: str, dtype: torch.dtype | None = None) -> Tensor:
        assert dtype in (None, torch.float32), "a GPU keeps small tensors in float32"
        return self._weights.floats(role, self._layer)

    def parts(self, *roles: str, cols: int) -> tuple[Part, ...]:
        return self._weights.parts(*roles, cols=cols, layer=self._layer)

    def raw(self, role: str) -> tuple[str, Tensor]:
        return self._weights.raw(role, self._layer)

    def in_slots(self, fmt: str, raw: Tensor, cols: int) -> Part:
        return self._weights.in_slots(fmt, raw, cols)


def striped(norms: Sandwich) -> Sandwich:
    """The same weights in the order of kernels.striped, for the decode step."""
    return replace(norms, **{name: stripe(w) for name, w in vars(norms).items() if w.numel() > 1})
