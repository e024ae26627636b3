"""Phi-3.5-MoE and Phi-mini-MoE: sparse-mixer routing, LayerNorms, biases of all projections, LongRoPE."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.fields import flag, number
from offmoe.errors import OffmoeError
from offmoe.models.config import ModelConfig
from offmoe.models.families.mixtral import NAMES
from offmoe.models.family import Family
from offmoe.models.rope import rope_parameters
from offmoe.models.shared_fields import one_window


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The mscales, which must be equal, are the factor of cos and sin."""
    rope = dict(rope_parameters(raw))
    short, long = (number(rope, name, 1.0) for name in ("short_mscale", "long_mscale"))
    if rope["rope_type"] == "longrope":
        if short != long:
            raise OffmoeError(
                f"phimoe: short_mscale is {short:g} and long_mscale {long:g}, and offmoe implements equal ones: "
                "this model cannot be run yet"
            )
        rope["attention_factor"] = long
    return {**raw, "rope_scaling": None, "rope_parameters": rope}


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    biased = flag(raw, "attention_bias", False)
    rule = replace(config.moe.rule, scores="mixer", jitter=number(raw, "router_jitter_noise", 0.01))
    config = one_window(raw, config).with_norm(bias=True).with_stream(head_bias=flag(raw, "lm_head_bias", False))
    return config.with_moe(rule=rule).with_heads(qkv_bias=biased, o_bias=biased)


DEFAULTS = {
    "vocab_size": 32064, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": None, "num_experts": 16, "num_experts_per_tok": 2,
    "moe_intermediate_size": 6400, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0, "tie_word_embeddings": False, "sliding_window": None, "router_jitter_noise": 0.01,
    "attention_bias": False, "lm_head_bias": False,
}  # fmt: skip

FAMILY = Family(
    model_type="phimoe",
    arch="phimoe",
    published="Phi-3.5-MoE",
    qk_norm="none",
    renormalise=False,
    defaults=DEFAULTS,
    own={"num_experts": ("num_local_experts",), "moe_intermediate_size": ("intermediate_size",)},
    names=NAMES,
    translated=translated,
    configured=configured,
    implemented={"attention_bias": (), "num_experts_per_tok": (2,), "norm_topk_prob": (False, None)},
)
