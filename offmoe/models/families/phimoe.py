"""Phi-3.5-MoE and Phi-mini-MoE: sparse-mixer routing, LayerNorms, biases of all projections, LongRoPE."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.fields import count, flag, number
from offmoe.errors import OffmoeError
from offmoe.models.config import ModelConfig
from offmoe.models.families.mixtral import MIXTRAL_NAMES
from offmoe.models.family import Family
from offmoe.models.rope import rope_parameters


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The mscales, which must be equal, are the factor of cos and sin; a window as long as the context is none."""
    rope = dict(rope_parameters(raw))
    short, long = (number(rope, name, 1.0) for name in ("short_mscale", "long_mscale"))
    if rope["rope_type"] == "longrope":
        if short != long:
            raise OffmoeError(
                f"phimoe: short_mscale is {short:g} and long_mscale {long:g}, and offmoe implements equal ones: "
                "this model cannot be run yet"
            )
        rope["attention_factor"] = long
    window = raw.get("sliding_window")
    wide = isinstance(window, int) and window >= count(raw, "max_position_embeddings", default=4096)
    return {**raw, "rope_scaling": None, "rope_parameters": rope, "sliding_window": None if wide else window}


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    biased = flag(raw, "attention_bias", False)
    rule = replace(config.moe.rule, scores="mixer", jitter=number(raw, "router_jitter_noise", 0.01))
    config = config.with_norm(bias=True).with_stream(head_bias=flag(raw, "lm_head_bias", False))
    return config.with_moe(rule=rule).with_heads(qkv_bias=biased, o_bias=biased)


FAMILY = Family(
    model_type="phimoe",
    arch="phimoe",
    published="Phi-3.5-MoE",
    qk_norm="none",
    renormalise=False,
    names={**MIXTRAL_NAMES, "router": (*MIXTRAL_NAMES["router"], "model.layers.{l}.mlp.router.weight")},
    rope_theta=1_000_000.0,
    translated=translated,
    configured=configured,
    implemented={"attention_bias": (), "num_experts_per_tok": (2,), "norm_topk_prob": (False, None)},
)
