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
    config = shared_experts(raw, config, count(raw, "n_shared_experts"))
    return config.with_heads(
        qkv_bias=flag(raw, "attention_bias", False), qk_norm="head" if flag(raw, "use_qk_norm", False) else "none"
    )


DEFAULTS = {
    "vocab_size": 151552, "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "head_dim": None, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "partial_rotary_factor": 0.5, "intermediate_size": 10944,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "use_qk_norm": False, "attention_bias": False,
}  # fmt: skip

FAMILY = Family(
    model_type="glm4_moe",
    arch="glm4moe",
    published="GLM-4.5-Air",
    qk_norm="none",
    renormalise=False,
    defaults=DEFAULTS,
    own={"num_experts": ("n_routed_experts", "num_local_experts")},
    gguf_names={**GGUF_NAMES, "ffn_norm": ("blk.{l}.post_attention_norm.weight",)},
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
