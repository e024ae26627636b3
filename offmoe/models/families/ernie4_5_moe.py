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
OURS = {
    "num_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_k",
    "n_shared_experts": "moe_num_shared_experts",
    "first_k_dense_replace": "moe_layer_start_index",
}


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Baidu's field names → those of the other families. moe_layer_end_index may name the last layer, which is all."""
    last = raw.get("moe_layer_end_index")
    last = None if last in (-1, count(raw, "num_hidden_layers") - 1) else last
    return {**raw, "moe_layer_end_index": last, **{o: raw[theirs] for o, theirs in OURS.items() if theirs in raw}}


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    config = first_dense(raw, config)
    config = config.with_moe(rule=replace(config.moe.rule, biased=True))
    return shared_experts(raw, config, int(number(raw, "n_shared_experts", 0)))


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    return {"interleave_moe_layer_step": 1, "expert_shared_feed_forward_length": config.moe.shared_hidden}


FAMILY = Family(
    model_type="ernie4_5_moe",
    arch="ernie4_5-moe",
    published="ERNIE-4.5-21B-A3B",
    qk_norm="none",
    renormalise=True,
    names={**HF_NAMES, "router_bias": (f"{BLOCK}.moe_statics.{BIAS}", f"{BLOCK}.gate.moe_statics.{BIAS}")},
    rope_theta=500_000.0,
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
        "moe_layer_end_index": (None,),
        "moe_norm_min": (1e-12, None),
        "use_correction_bias": (True, None),
    },
)
