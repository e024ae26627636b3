"""GLM-4.5, 4.6 and 4.5-Air: sigmoid router with a correction bias, shared experts, first layers dense, half a head
rotated, q and k normed per head in the large ones."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.fields import count, flag
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import GGUF_NAMES
from offmoe.models.shared_fields import balanced_by_bias, first_dense, shared_experts


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    config = balanced_by_bias(raw, first_dense(raw, config))
    config = shared_experts(raw, config, count(raw, "n_shared_experts", default=1))
    return config.with_heads(
        qkv_bias=flag(raw, "attention_bias", False), qk_norm="head" if flag(raw, "use_qk_norm", False) else "none"
    )


FAMILY = Family(
    model_type="glm4_moe",
    arch="glm4moe",
    published="GLM-4.5-Air",
    qk_norm="none",
    renormalise=True,
    gguf_names={**GGUF_NAMES, "ffn_norm": ("blk.{l}.post_attention_norm.weight",)},
    partial_rotary=0.5,
    configured=configured,
    implemented={
        "partial_rotary_factor": (),
        "attention_bias": (),
        "n_shared_experts": (),
        "first_k_dense_replace": (),
        "routed_scaling_factor": (),
        "n_group": (),
        "expert_gating_func": (2,),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
    },
)
