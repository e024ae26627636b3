"""ERNIE 4.5 (21B-A3B, 300B-A47B): softmax router with a correction bias, shared experts, first layers dense; rotated
pairs are neighbours."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.fields import count, number
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import HF_NAMES
from offmoe.models.shared_fields import first_dense, shared_experts

BIAS = "e_score_correction_bias"
BLOCK = "model.layers.{l}.mlp"
OWN = {
    "num_experts": ("moe_num_experts", "num_experts"),
    "num_experts_per_tok": ("moe_k", "num_experts_per_tok"),
    "n_shared_experts": ("moe_num_shared_experts",),
    "first_k_dense_replace": ("moe_layer_start_index",),
}


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """moe_layer_end_index may name the last layer, which is all."""
    last = raw.get("moe_layer_end_index")
    last = None if last in (-1, count(raw, "num_hidden_layers") - 1) else last
    return {**raw, "moe_layer_end_index": last}


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    config = first_dense(raw, config)
    config = config.with_moe(rule=replace(config.moe.rule, biased=True))
    return shared_experts(raw, config, int(number(raw, "n_shared_experts", 0)))


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    return {"interleave_moe_layer_step": 1, "expert_shared_feed_forward_length": config.moe.shared_hidden}


DEFAULTS = {
    "vocab_size": 103424, "hidden_size": 2560, "num_hidden_layers": 28, "num_attention_heads": 20,
    "num_key_value_heads": 4, "head_dim": None, "num_experts": 64, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1536, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    "tie_word_embeddings": True, "intermediate_size": 12288, "first_k_dense_replace": 1, "n_shared_experts": 2,
}  # fmt: skip

FAMILY = Family(
    model_type="ernie4_5_moe",
    arch="ernie4_5-moe",
    published="ERNIE-4.5-21B-A3B",
    qk_norm="none",
    renormalise=True,
    defaults=DEFAULTS,
    own=OWN,
    names={**HF_NAMES, "router_bias": (f"{BLOCK}.moe_statics.{BIAS}", f"{BLOCK}.gate.moe_statics.{BIAS}")},
    interleaved=True,
    translated=translated,
    gguf_keys=gguf_keys,
    configured=configured,
    implemented={
        "n_shared_experts": (),
        "shared_expert_intermediate_size": (),  # a GGUF says both
        "first_k_dense_replace": (),
        "use_bias": (False, None),
        "moe_layer_interval": (1, None),
        "interleave_moe_layer_step": (1, None),  # what a GGUF calls it
        "moe_layer_end_index": (None,),
        "moe_norm_min": (1e-12, None),
        "use_correction_bias": (True, None),
    },
)
