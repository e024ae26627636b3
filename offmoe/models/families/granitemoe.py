"""Granite 3 MoE (1b-a400m, 3b-a800m): plain GQA, and four multipliers."""

from collections.abc import Mapping
from typing import Any

from offmoe.kernels.route import Rule
from offmoe.models.config import ModelConfig
from offmoe.models.family import HF_NAMES, Family, experts_apart
from offmoe.models.fields import number

BLOCK = "model.layers.{l}.block_sparse_moe"
APART = experts_apart(BLOCK + ".experts")


def fields(raw: Mapping[str, Any], layers: int, rule: Rule) -> dict[str, Any]:
    return {
        "embed_scale": number(raw, "embedding_multiplier", 1.0),
        "residual_scale": number(raw, "residual_multiplier", 1.0),
        "attention_scale": number(raw, "attention_multiplier", 1.0),
        "logit_divisor": number(raw, "logits_scaling", 1.0),
    }


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_scale": config.embed_scale,
        "residual_scale": config.residual_scale,
        "attention.scale": config.attention_scale,
        "logit_scale": config.logit_divisor,
    }


FAMILY = Family(
    model_type="granitemoe",
    arch="granitemoe",
    published="Granite-3.1-3B-A800M",
    qk_norm="none",
    renormalise=True,
    names={
        **HF_NAMES,
        **APART,
        "router": (BLOCK + ".router.layer.weight", BLOCK + ".router.weight"),
        "gate_up": (BLOCK + ".input_linear.weight", BLOCK + ".experts.gate_up_proj"),
        "down": (BLOCK + ".output_linear.weight", BLOCK + ".experts.down_proj", *APART["down"]),
    },
    interleaved_gguf=True,
    gguf_keys=gguf_keys,
    fields=fields,
)
