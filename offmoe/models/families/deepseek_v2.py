"""DeepSeek V2, V2.5, V2-Lite and Coder-V2: latent attention, softmax router, in the large ones with expert groups,
shared experts, first layers dense (arXiv 2405.04434)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.fields import count, number
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.shared_fields import first_dense, latent_attention, shared_experts


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Groups are ranked by their best expert. A GGUF has no topk_method: one with groups means group_limited_greedy."""
    config = first_dense(raw, latent_attention(raw, config))
    rule = replace(config.moe.rule, scale=number(raw, "routed_scaling_factor", 1.0))
    if raw.get("topk_method", "group_limited_greedy") == "group_limited_greedy":
        rule = replace(rule, groups=count(raw, "n_group", default=1), kept=count(raw, "topk_group", default=1))
    return shared_experts(raw, config.with_moe(rule=rule), count(raw, "n_shared_experts", default=2))


FAMILY = Family(
    model_type="deepseek_v2",
    arch="deepseek2",
    published="DeepSeek-V2-Lite-Chat",
    qk_norm="none",
    renormalise=False,
    priority=1,
    configured=configured,
    implemented={
        "kv_lora_rank": (),
        "n_shared_experts": (),
        "first_k_dense_replace": (),
        "routed_scaling_factor": (),
        "n_group": (),
        "moe_layer_freq": (1, None),
        "norm_topk_prob": (False, None),
        "topk_method": ("greedy", "group_limited_greedy", None),
    },
)
