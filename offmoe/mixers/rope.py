"""Rotary embedding of a layer (arXiv 2104.09864): its numbers, and one table for all layers that share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.rope import PLAIN, AttentionTemperature, Scaling, no_rope_table, rope_table


@dataclass(frozen=True)
class RopeConfig:
    """Rotation of the first `rotary` values of a head by angles of base `theta`."""

    rotary: int
    theta: float
    scaling: Scaling = PLAIN


class RopeTables:
    """Tables of a model's context on one device, made once for every kind of rotation."""

    def __init__(self, ctx: int, device: torch.device) -> None:
        self._ctx, self._device = ctx, device
        self._tables: dict[RopeConfig | None, Tensor] = {}
        self._temperatures: dict[AttentionTemperature, Tensor] = {}

    def table(self, rope: RopeConfig | None) -> Tensor:
        """cos and sin [2, ctx, rotary]; of a layer without positions, a table that rotates nothing."""
        if rope not in self._tables:
            self._tables[rope] = (
                rope_table(self._ctx, rope.rotary, rope.theta, self._device, rope.scaling)
                if rope
                else no_rope_table(self._ctx, self._device)
            )
        return self._tables[rope]

    def temperature(self, temperature: AttentionTemperature) -> Tensor:
        """Factors of the queries at every position [ctx] float32."""
        if temperature not in self._temperatures:
            self._temperatures[temperature] = temperature.table(self._ctx, self._device)
        return self._temperatures[temperature]


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise OffmoeError where heads cannot share keys, or cannot be rotated."""
    if heads % kv_heads:
        raise OffmoeError(f"{heads} heads do not divide among {kv_heads} key-value heads")
    if head_dim % 2 or not head_dim:
        raise OffmoeError(f"head_dim is {head_dim}: rotary embedding needs an even number above 0")


def check_rotary(rope: RopeConfig, head_dim: int) -> None:
    """Raise OffmoeError where a head cannot be rotated as `rope` says."""
    if rope.rotary % 2 or not 2 <= rope.rotary <= head_dim:
        raise OffmoeError(
            f"partial_rotary_factor asks for {rope.rotary} of {head_dim} values of a head to be rotated: "
            "expected an even number above 0"
        )
    check_rope(rope.scaling, rope.rotary, rope.theta)


def check_rope(scaling: Scaling, rotary: int, theta: float) -> None:
    """Raise OffmoeError where the numbers of one rotation contradict one another."""
    if theta < 1 or (theta == 1 and scaling.kind == "yarn"):
        raise OffmoeError(f"rope_theta is {theta:g}: expected at least 1{', and more for yarn' * (theta == 1)}")
    if scaling.kind == "dynamic" and rotary == 2:
        raise OffmoeError("rope_type is 'dynamic' for 2 values of a head: expected more")
    if scaling.kind == "llama3" and scaling.fast < scaling.slow:
        raise OffmoeError(
            f"high_freq_factor is {scaling.fast:g} and low_freq_factor {scaling.slow:g}: expected no smaller first"
        )
    for name, factors in (("short_factor", scaling.short), ("long_factor", scaling.long)):
        if scaling.kind == "longrope" and len(factors) != rotary // 2:
            raise OffmoeError(f"{name} has {len(factors)} numbers: expected one for each of {rotary // 2} pairs")
