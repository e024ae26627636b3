"""Numbers of a gated DeltaNet layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from offmoe.checkpoint.fields import count
from offmoe.errors import OffmoeError
from offmoe.kernels.deltanet import Delta
from offmoe.mixers.base import Names
from offmoe.mixers.recurrent import RecurrentConfig

LINEAR = "model.layers.{l}.linear_attn."
HF_NAMES: Names = {
    "delta_qkv": (LINEAR + "in_proj_qkv.weight",),
    "delta_z": (LINEAR + "in_proj_z.weight",),
    "delta_b": (LINEAR + "in_proj_b.weight",),
    "delta_a": (LINEAR + "in_proj_a.weight",),
    "delta_qkvz": (LINEAR + "in_proj_qkvz.weight",),
    "delta_ba": (LINEAR + "in_proj_ba.weight",),
    "delta_conv": (LINEAR + "conv1d.weight",),
    "delta_dt": (LINEAR + "dt_bias",),
    "delta_decay": (LINEAR + "A_log",),
    "delta_norm": (LINEAR + "norm.weight",),
    "delta_o": (LINEAR + "out_proj.weight",),
}
GGUF_NAMES: Names = {
    "delta_qkv": ("blk.{l}.attn_qkv.weight",),
    "delta_z": ("blk.{l}.attn_gate.weight",),
    "delta_b": ("blk.{l}.ssm_beta.weight",),
    "delta_a": ("blk.{l}.ssm_alpha.weight",),
    "delta_qkvz": ("blk.{l}.ssm_in.weight",),
    "delta_ba": ("blk.{l}.ssm_ba.weight",),
    "delta_conv": ("blk.{l}.ssm_conv1d.weight",),
    "delta_dt": ("blk.{l}.ssm_dt.bias",),
    "delta_decay": ("blk.{l}.ssm_a",),
    "delta_norm": ("blk.{l}.ssm_norm.weight",),
    "delta_o": ("blk.{l}.ssm_out.weight",),
}


@dataclass(frozen=True)
class DeltaConfig(RecurrentConfig):
    """A DeltaNet behind a short convolution; its output is normed and gated."""

    package: ClassVar[str] = "deltanet"
    label: ClassVar[str] = "DeltaNet"
    hf_names: ClassVar[Names] = HF_NAMES
    gguf_names: ClassVar[Names] = GGUF_NAMES
    float32_roles: ClassVar[frozenset[str]] = frozenset(
        ("delta_b", "delta_a", "delta_ba", "delta_conv", "delta_dt", "delta_decay")
    )
    out_proj: ClassVar[str] = "delta_o"

    delta: Delta
    eps: float  # of the output's norm

    @classmethod
    def from_fields(cls, raw: Mapping[str, Any], eps: float) -> DeltaConfig:
        """Fields of Qwen3-Next's config.json."""
        delta = Delta(
            key_heads=count(raw, "linear_num_key_heads"),
            value_heads=count(raw, "linear_num_value_heads"),
            key_dim=count(raw, "linear_key_head_dim"),
            value_dim=count(raw, "linear_value_head_dim"),
            taps=count(raw, "linear_conv_kernel_dim"),
        )
        if delta.value_heads % delta.key_heads:
            raise OffmoeError(
                f"linear_num_value_heads is {delta.value_heads}: expected a multiple of {delta.key_heads} key heads"
            )
        if delta.taps < 2:
            raise OffmoeError(f"linear_conv_kernel_dim is {delta.taps}: expected at least 2")
        return cls(delta, eps)

    @property
    def state_shape(self) -> Delta:
        return self.delta

    @property
    def in_proj(self) -> tuple[str, ...]:
        return ("delta_qkv", "delta_z", "delta_b", "delta_a")

    def shapes(self, hidden: int, split: bool = False) -> dict[str, tuple[int, ...]]:
        d = self.delta
        return {
            **{role: (rows, hidden) for role, rows in zip(self.in_proj, d.projected, strict=True)},
            "delta_conv": (d.channels, d.taps),
            "delta_dt": (d.value_heads,),
            "delta_decay": (d.value_heads,),
            "delta_norm": (d.value_dim,),
            "delta_o": (hidden, d.values),
        }

    @property
    def held(self) -> Mapping[str, str]:
        return {"delta_qkv": "delta_qkvz", "delta_z": "delta_qkvz", "delta_b": "delta_ba", "delta_a": "delta_ba"}

    def held_shape(self, holder: str, hidden: int) -> tuple[int, ...]:
        qkv, z, b, a = self.delta.projected
        return {"delta_qkvz": qkv + z, "delta_ba": b + a}[holder], hidden

    def held_rows(self, role: str) -> Tensor:
        """A key head's query, key, values and gates are neighbours, as are its b and a."""
        d = self.delta
        heads = d.value_heads // d.key_heads
        values = heads * d.value_dim
        sizes = (heads, heads) if role in ("delta_b", "delta_a") else (d.key_dim, d.key_dim, values, values)
        parts = torch.arange(d.key_heads * sum(sizes)).view(d.key_heads, -1).split(sizes, dim=1)
        if role == "delta_qkv":
            return torch.cat([part.flatten() for part in parts[:3]])
        return parts[{"delta_z": 3, "delta_b": 0, "delta_a": 1}[role]].flatten()

    def gguf_keys(self) -> dict[str, Any]:
        d = self.delta
        return {
            "ssm.conv_kernel": d.taps,
            "ssm.state_size": d.key_dim,
            "ssm.group_count": d.key_heads,
            "ssm.time_step_rank": d.value_heads,
            "ssm.inner_size": d.values,
        }

    def gguf_order(self, role: str, interleaved: bool, tiled: bool) -> Callable[[Tensor], Tensor] | None:
        return partial(tile, role=role, d=self.delta) if tiled and role.startswith("delta") else None


def tile(weight: Tensor, role: str, d: Delta) -> Tensor:
    """Reorder a role's [rows, cols] as llama.cpp does: the first value head of every key head, then the second …"""
    order = torch.arange(d.value_heads).view(d.key_heads, -1).t().flatten()
    cells = (order[:, None] * d.value_dim + torch.arange(d.value_dim)).flatten()
    if role in ("delta_qkv", "delta_conv"):
        return weight[torch.cat((torch.arange(2 * d.keys), 2 * d.keys + cells))]
    if role in ("delta_b", "delta_a"):
        return weight[order]
    if role in ("delta_dt", "delta_decay"):
        return weight[:, order]
    if role == "delta_o":
        return weight[:, cells]
    return weight[cells] if role == "delta_z" else weight
