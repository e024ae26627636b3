"""Qwen3-Next (80B-A3B): three of four layers are gated DeltaNet, the others attention with gated heads, a quarter of
each rotated; 512 experts and a gated shared one. RMS norms count their weights from 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.deltanet import Delta
from offmoe.kernels.route import Rule
from offmoe.models.config import ModelConfig
from offmoe.models.family import GGUF_NAMES, Family
from offmoe.models.fields import count
from offmoe.models.recurrent import FULL, recurrent_layers
from offmoe.models.shared_fields import sparse_layers

LINEAR = "linear_attention"  # a kind of layer
GGUF = {**GGUF_NAMES, "ffn_norm": ("blk.{l}.post_attention_norm.weight",)}


def fields(raw: Mapping[str, Any], layers: int, rule: Rule) -> dict[str, Any]:
    """Of the whole line: the newer models have the same config, with fewer fields."""
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
    return {
        **sparse_layers(raw, layers),
        "shared": 1,
        "shared_hidden": count(raw, "shared_expert_intermediate_size"),
        "shared_gated": True,
        "output_gated": True,
        "mixer": delta,
        "recurrent": linear_layers(raw, layers),
    }


def linear_layers(raw: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """By a list of kinds, or all but every so many."""
    kinds, every = raw.get("layer_types"), count(raw, "full_attention_interval", default=4)
    if kinds is None:
        kinds = [LINEAR if (layer + 1) % every else FULL for layer in range(layers)]
    return recurrent_layers(kinds, layers, LINEAR)


def from_one(weight: Tensor) -> Tensor:
    return weight + 1


def below_zero(logarithm: Tensor) -> Tensor:
    return -logarithm.exp()


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """Raises OffmoeError where the layers with keys are not every so many."""
    d, linear = config.delta, config.recurrent
    assert d
    every = linear_every(config)
    if every is None:
        raise OffmoeError(
            f"{config.model_type} with DeltaNet in the layers {linear} cannot be packed: "
            "in a GGUF all are but every so many"
        )
    return {
        "ssm.conv_kernel": d.taps,
        "ssm.state_size": d.key_dim,
        "ssm.group_count": d.key_heads,
        "ssm.time_step_rank": d.value_heads,
        "ssm.inner_size": d.values,
        "full_attention_interval": every,
    }


def linear_every(config: ModelConfig) -> int | None:
    """Every which layer has keys, if it is so."""
    every = range(1, config.layers + 1)
    return next((n for n in every if config.attended == tuple(range(n - 1, config.layers, n))), None)


FAMILY = Family(
    model_type="qwen3_next",
    arch="qwen3next",
    published="Qwen3-Next-80B-A3B-Instruct",
    qk_norm="head",
    renormalise=True,
    gguf_names={role: names for role, names in GGUF.items() if role not in ("delta_b", "delta_a")},
    gguf_keys=gguf_keys,
    partial_rotary=0.25,
    values={
        **dict.fromkeys(("attn_norm", "ffn_norm", "final_norm", "q_norm", "k_norm"), from_one),
        "delta_decay": below_zero,
    },
    fields=fields,
    implemented={
        "layer_types": (FULL, LINEAR),
        "partial_rotary_factor": (),
        "shared_expert_intermediate_size": (),
        "use_sliding_window": (False, None),
        "attn_output_gate": (True, None),
    },
)


def sibling(**changes: Any) -> Family:
    """A family of the same layers."""
    return replace(FAMILY, **changes)
