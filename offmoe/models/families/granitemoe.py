"""Granite 3 MoE (1b-a400m, 3b-a800m): grouped-query attention; embedding, residual, scores and logits are scaled."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.fields import number
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import HF_NAMES, feed_forward

BLOCK = feed_forward("block_sparse_moe.")


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """A GGUF without attention.scale has that of the other families."""
    config = config.with_stream(
        embed_scale=number(raw, "embedding_multiplier", 1.0),
        residual_scale=number(raw, "residual_multiplier", 1.0),
        logit_divisor=number(raw, "logits_scaling", 1.0),
    )
    return config.with_heads(scale=number(raw, "attention_multiplier", 0.0))


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_scale": config.stream.embed_scale,
        "residual_scale": config.stream.residual_scale,
        "attention.scale": config.heads.scale,
        "logit_scale": config.stream.logit_divisor,
    }


DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 11008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
    "attention_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip

FAMILY = Family(
    model_type="granitemoe",
    arch="granitemoe",
    published="Granite-3.1-3B-A800M",
    qk_norm="none",
    renormalise=True,
    defaults=DEFAULTS,
    own={"num_experts": ("num_local_experts",), "moe_intermediate_size": ("intermediate_size",)},
    names={
        **HF_NAMES,
        **BLOCK,
        "router": ("model.layers.{l}.block_sparse_moe.router.layer.weight", *BLOCK["router"]),
        "gate_up": ("model.layers.{l}.block_sparse_moe.input_linear.weight", *BLOCK["gate_up"]),
        "down": ("model.layers.{l}.block_sparse_moe.output_linear.weight", *BLOCK["down"]),
    },
    interleaved_gguf=True,
    gguf_keys=gguf_keys,
    configured=configured,
    implemented={"rope_finetuned": (True, None)},  # in a GGUF of this arch, whether heads are rotated at all
)
