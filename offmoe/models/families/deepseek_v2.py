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
    return shared_experts(raw, config.with_moe(rule=rule), count(raw, "n_shared_experts"))


DEFAULTS = {
    "vocab_size": 102400, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_experts": 64, "num_experts_per_tok": None, "moe_intermediate_size": 1407, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "intermediate_size": 11008,
    "first_k_dense_replace": 0, "n_shared_experts": 2, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "routed_scaling_factor": 1.0,
    "n_group": None, "topk_group": None, "topk_method": "greedy",
}  # fmt: skip

FAMILY = Family(
    model_type="deepseek_v2",
    arch="deepseek2",
    published="DeepSeek-V2-Lite-Chat",
    qk_norm="none",
    renormalise=False,
    defaults=DEFAULTS,
    own={"num_experts": ("n_routed_experts", "num_experts")},
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
        "mlp_bias": (False, None),
        "topk_method": ("greedy", "group_limited_greedy", None),
    },
)
