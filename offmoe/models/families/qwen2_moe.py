"""Qwen2 MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): QKV bias, a shared expert with a sigmoid gate."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.fields import count, flag
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.shared_fields import sparse_layers


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    shared = count(raw, "shared_expert_intermediate_size", "intermediate_size")
    biased = flag(raw, "qkv_bias", flag(raw, "attention_bias", True))
    config = sparse_layers(raw, config).with_moe(shared=1, shared_hidden=shared, shared_gated=True)
    return config.with_heads(qkv_bias=biased)


FAMILY = Family(
    model_type="qwen2_moe",
    arch="qwen2moe",
    published="Qwen1.5-MoE-A2.7B",
    qk_norm="none",
    renormalise=False,
    configured=configured,
    implemented={
        "shared_expert_intermediate_size": (),
        "n_shared_experts": (),
        "attention_bias": (),  # what a GGUF says of the QKV bias
        "use_sliding_window": (False, None),
        "sliding_window": (None, 0, 4096, 32768, 65536),  # kept in configs that do not use it
    },
)
