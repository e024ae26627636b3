"""Weights of the trunk on the CPU, as plain torch multiplies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offmoe.kernels.sandwich import Sandwich
from offmoe.mixers.protocols import HostMixer
from offmoe.mixers.registry import host_mixer
from offmoe.mixers.rope import RopeTables
from offmoe.models.model import Model


@dataclass(frozen=True)
class LayerWeights:
    """One layer's trunk. Letters as in mixers.base."""

    attn_norm: Tensor  # [H]
    attn_norm_bias: Tensor | None  # [H]
    in_proj: Tensor  # [H, P]
    in_bias: Tensor | None  # [P]
    mixer: HostMixer
    out_proj: Tensor  # [M, H]
    out_bias: Tensor | None  # [H]
    ffn_norm: Tensor  # [H]
    ffn_norm_bias: Tensor | None  # [H]
    router: Tensor | None  # [H, E], where there are experts
    router_bias: Tensor | None  # [E] float32
    router_offset: Tensor | None  # [E]
    router_factors: Tensor | None  # [E] float32
    # Of shared experts, or of a dense layer: gate and up concatenated [H, 2F], down [F, H].
    resident_ffn: tuple[Tensor, Tensor] | None
    shared_router: Tensor | None  # [H, 1]
    sandwich: Sandwich | None

    def tensors(self) -> list[Tensor]:
        values = [*vars(self).values(), *(self.resident_ffn or ()), *self.mixer.tensors()]
        values += self.sandwich.tensors() if self.sandwich else []
        return [value for value in values if isinstance(value, Tensor)]


class HostWeights:
    """Reads a model's trunk, one layer at a time."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, ctx: int) -> None:
        self.model, self.config, self.device, self.dtype = model, model.config, device, dtype
        self.tiled, self.ropes = model.tiled, RopeTables(ctx, device)

    def layer(self, layer: int) -> LayerWeights:
        c, moe, mixer = self.config, self.config.moe, self.config.mixers[layer]
        routed, tensors = layer in moe.routed, LayerTensors(self, layer)
        load = tensors.load
        resident_ffn = "dense" if not routed else "shared" if moe.shared else None
        return LayerWeights(
            attn_norm=load("attn_norm"),
            attn_norm_bias=load("attn_norm_bias") if c.norm.bias else None,
            in_proj=factor(torch.cat([load(role) for role in mixer.in_proj])),
            in_bias=torch.cat([load(role) for role in mixer.in_bias]) if mixer.in_bias else None,
            mixer=host_mixer(mixer, tensors),
            out_proj=factor(load(mixer.out_proj)),
            out_bias=load(mixer.out_bias) if mixer.out_bias else None,
            ffn_norm=load("ffn_norm"),
            ffn_norm_bias=load("ffn_norm_bias") if c.norm.bias else None,
            router=factor(self._router(load)) if routed else None,
            router_bias=load("router_bias", torch.float32) if routed and moe.rule.biased else None,
            router_offset=load("router_offset") if routed and moe.router_offset else None,
            router_factors=load("router_factors", torch.float32) if routed and moe.rule.scaled else None,
            resident_ffn=feed_forward(load, resident_ffn) if resident_ffn else None,
            shared_router=load("shared_router").view(-1, 1) if routed and moe.shared_gated else None,
            sandwich=sandwich(load) if c.norm.sandwich else None,
        )

    def load(self, role: str, layer: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of `role` as it is computed with: its own rows, in order, transformed."""
        info, rows = self.model.stored(role, layer)
        dtype, weight_transform = dtype or self.dtype, self.model.weight_transform(role)
        weight = self.model.checkpoint.tensor(info.name, torch.float32 if weight_transform else dtype)
        weight = weight if rows is None else weight[rows]
        weight = weight_transform(weight).to(dtype) if weight_transform else weight
        order = self.config.mixers[layer].row_order(role, self.model.interleaved)
        return (weight if order is None else weight[order]).to(self.device)

    def _router(self, load: Callable[[str], Tensor]) -> Tensor:
        router = load("router")
        return gained(router, load("router_gain")) if self.config.norm.sandwich else router


class LayerTensors:
    """Tensors of one layer by role (mixers.protocols.Tensors)."""

    def __init__(self, weights: HostWeights, layer: int) -> None:
        self.ropes, self.device, self.dtype, self.tiled = weights.ropes, weights.device, weights.dtype, weights.tiled
        self._weights, self._layer = weights, layer

    def has(self, role: str) -> bool:
        return self._weights.model.find(role, self._layer) is not None

    def load(self, role: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._weights.load(role, self._layer, dtype)


def feed_forward(load: Callable[[str], Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Gate and up concatenated [H, 2F], and down [F, H]; kind: dense or shared."""
    gate, up, down = (load(f"{kind}_{part}") for part in ("gate", "up", "down"))
    return factor(torch.cat((gate, up))), factor(down)


def sandwich(load: Callable[[str], Tensor]) -> Sandwich:
    """Norms around the parts of a layer."""
    return Sandwich(
        load("attn_post_norm"), load("shared_norm"), load("shared_post_norm"), load("routed_post_norm"),
        load("ffn_post_norm"), load("layer_scale"),
    )  # fmt: skip


def gained(router: Tensor, gain: Tensor) -> Tensor:
    """A router [E, H] times the weights [H] of a norm of its own, divided by √H."""
    return router * gain * router.shape[1] ** -0.5


def factor(weight: Tensor) -> Tensor:
    """[out, in] as files have it → [in, out] for `x @ w`: MKL then reads 20 GB/s for one vector instead of 11."""
    return weight.t().contiguous()
