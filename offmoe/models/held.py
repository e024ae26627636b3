"""Roles that a file keeps in a tensor together with others, or in another order."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.models.config import ModelConfig

# Role → whose tensor holds it where it has none of its own. Heads that are gated have q_gate in q, always.
HELD = {
    "q_gate": "q",
    "delta_qkv": "delta_qkvz",
    "delta_z": "delta_qkvz",
    "delta_b": "delta_ba",
    "delta_a": "delta_ba",
}


def held_shape(role: str, config: ModelConfig) -> tuple[int, int]:
    """Of a tensor that holds others."""
    assert config.delta, f"{role} belongs to layers without keys"
    qkv, z, b, a = config.delta.projected
    return {"delta_qkvz": qkv + z, "delta_ba": b + a}[role], config.hidden


def held_rows(role: str, config: ModelConfig) -> Tensor:
    """The rows of `role`, in our order, in the tensor that holds it."""
    if role in ("q", "q_gate"):
        rows = torch.arange(2 * config.heads * config.head_dim).view(config.heads, 2, -1)
        return rows[:, int(role == "q_gate")].flatten()
    assert config.delta
    d = config.delta
    heads = d.value_heads // d.key_heads  # a key head's own, which stand together
    values = heads * d.value_dim
    sizes = (heads, heads) if role in ("delta_b", "delta_a") else (d.key_dim, d.key_dim, values, values)
    parts = torch.arange(d.key_heads * sum(sizes)).view(d.key_heads, -1).split(sizes, dim=1)
    if role == "delta_qkv":
        return torch.cat([part.flatten() for part in parts[:3]])
    return parts[{"delta_z": 3, "delta_b": 0, "delta_a": 1}[role]].flatten()


def tiled(weight: Tensor, role: str, config: ModelConfig) -> Tensor:
    """[rows, cols] of a DeltaNet's role with the value heads of one key head together → in llama.cpp's order: first the
    first of every key head, then the second …"""
    d = config.delta
    assert d
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
