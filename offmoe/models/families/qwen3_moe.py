"""Qwen3 MoE (30B-A3B, 235B-A22B, Coder, Thinking): q and k normed per head, softmax router."""

from offmoe.models.family import Family
from offmoe.models.shared_fields import sparse_layers

FAMILY = Family(
    model_type="qwen3_moe",
    arch="qwen3moe",
    published="Qwen3-30B-A3B",
    qk_norm="head",
    renormalise=True,
    configured=sparse_layers,
    implemented={
        "use_sliding_window": (False, None),
        "sliding_window": (None, 4096, 32768),  # kept in configs that do not use it
    },
)
