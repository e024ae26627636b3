"""Qwen2 MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): QKV bias, a shared expert times the sigmoid of a gate of its own."""

from collections.abc import Mapping
from typing import Any

from offmoe.kernels.route import Rule
from offmoe.models.family import Family
from offmoe.models.fields import count, flag
from offmoe.models.shared_fields import sparse_layers


def fields(raw: Mapping[str, Any], layers: int, rule: Rule) -> dict[str, Any]:
    shared = count(raw, "shared_expert_intermediate_size", "intermediate_size")
    more = {
        "shared": 1,
        "shared_hidden": shared,
        "shared_gated": True,
        "qkv_bias": flag(raw, "qkv_bias", flag(raw, "attention_bias", True)),
    }
    return {**sparse_layers(raw, layers), **more}


FAMILY = Family(
    model_type="qwen2_moe",
    arch="qwen2moe",
    published="Qwen1.5-MoE-A2.7B",
    qk_norm="none",
    renormalise=False,
    fields=fields,
    implemented={
        "shared_expert_intermediate_size": (),
        "n_shared_experts": (),
        "attention_bias": (),  # what a GGUF says of the QKV bias
        "use_sliding_window": (False, None),
        "sliding_window": (None, 0, 4096, 32768, 65536),  # kept in configs that do not use it
    },
)
