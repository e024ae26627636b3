"""DeepSeek V3, R1 and V3.1: latent attention, sigmoid router with a correction bias and expert groups, a shared expert,
first layers dense (arXiv 2412.19437). Layers behind the last, which predict further tokens, are not loaded."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.fields import count
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.shared_fields import balanced_by_bias, first_dense, latent_attention, shared_experts


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    config = balanced_by_bias(raw, first_dense(raw, latent_attention(raw, config)))
    return shared_experts(raw, config, count(raw, "n_shared_experts", default=1))


FAMILY = Family(
    model_type="deepseek_v3",
    arch="deepseek2",
    published="DeepSeek-V3",
    qk_norm="none",
    renormalise=True,
    priority=2,
    configured=configured,
    implemented={
        "kv_lora_rank": (),
        "n_shared_experts": (),
        "first_k_dense_replace": (),
        "routed_scaling_factor": (),
        "n_group": (),
        "moe_layer_freq": (1, None),
        "rope_interleave": (True, None),
        "expert_gating_func": (2,),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
    },
)
