"""Qwen3 MoE (30B-A3B, 235B-A22B, Coder, Thinking): q and k normed per head, softmax router."""

from collections.abc import Mapping
from typing import Any

from offmoe.kernels.route import Rule
from offmoe.models.family import Family
from offmoe.models.shared_fields import sparse_layers


def fields(raw: Mapping[str, Any], layers: int, rule: Rule) -> dict[str, Any]:
    return sparse_layers(raw, layers)


FAMILY = Family(
    model_type="qwen3_moe",
    arch="qwen3moe",
    published="Qwen3-30B-A3B",
    qk_norm="head",
    renormalise=True,
    fields=fields,
    implemented={
        "use_sliding_window": (False, None),
        "sliding_window": (None, 4096, 32768),  # kept in configs that do not use it
    },
)
