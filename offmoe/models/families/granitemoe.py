"""Granite 3 MoE (1b-a400m, 3b-a800m): grouped-query attention; embedding, residual, scores and logits are scaled."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.fields import number
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import HF_NAMES, experts_apart

BLOCK = "model.layers.{l}.block_sparse_moe"
APART = experts_apart(BLOCK + ".experts")


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    config = config.with_stream(
        embed_scale=number(raw, "embedding_multiplier", 1.0),
        residual_scale=number(raw, "residual_multiplier", 1.0),
        logit_divisor=number(raw, "logits_scaling", 1.0),
    )
    return config.with_heads(scale=number(raw, "attention_multiplier", 1.0))


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_scale": config.stream.embed_scale,
        "residual_scale": config.stream.residual_scale,
        "attention.scale": config.heads.scale,
        "logit_scale": config.stream.logit_divisor,
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
    configured=configured,
)
