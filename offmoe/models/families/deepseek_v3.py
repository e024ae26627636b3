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
    return shared_experts(raw, config, count(raw, "n_shared_experts"))


DEFAULTS = {
    "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "intermediate_size": 18432,
    "first_k_dense_replace": 3, "n_shared_experts": 1, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "routed_scaling_factor": 2.5, "n_group": 8,
    "topk_group": 4, "norm_topk_prob": True,
}  # fmt: skip

FAMILY = Family(
    model_type="deepseek_v3",
    arch="deepseek2",
    published="DeepSeek-V3",
    qk_norm="none",
    renormalise=False,
    defaults=DEFAULTS,
    own={"num_experts": ("n_routed_experts", "num_local_experts")},
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
