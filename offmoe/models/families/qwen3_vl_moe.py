"""Qwen3-VL MoE (30B-A3B, 235B-A22B): the layers of Qwen3 MoE, experts stacked, inside a model with vision. Only its
language model is run: for text the positions of the three axes are one."""

from dataclasses import replace
from typing import Any

from offmoe.models.config import ModelConfig
from offmoe.models.families import qwen3_moe


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """The axes share the rotated pairs as they do in the published models; for text it makes no difference."""
    assert config.heads.rope
    pairs = config.heads.rope.rotary // 2
    side = pairs * 5 // 16
    return {"rope.dimension_sections": [pairs - 2 * side, side, side, 0]}


DEFAULTS = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": None, "num_experts": 60, "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 500_000.0,
    "tie_word_embeddings": True, "intermediate_size": 5632, "decoder_sparse_step": 1, "mlp_only_layers": None,
}  # fmt: skip

FAMILY = replace(
    qwen3_moe.FAMILY,
    model_type="qwen3_vl_moe",
    arch="qwen3vlmoe",
    published="Qwen3-VL-30B-A3B-Instruct",
    transposed_experts=True,
    defaults=DEFAULTS,
    outer={"tie_word_embeddings": False},
    gguf_keys=gguf_keys,
    implemented={**qwen3_moe.FAMILY.implemented, "norm_topk_prob": (True, None)},
)
