"""Qwen3 MoE (30B-A3B, 235B-A22B, Coder, Thinking): q and k normed per head, softmax router."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.fields import flag
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.shared_fields import one_window, sparse_layers


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    config = sparse_layers(raw, config)
    return one_window(raw, config) if flag(raw, "use_sliding_window", False) else config


DEFAULTS = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": None, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "intermediate_size": 6144, "decoder_sparse_step": 1, "mlp_only_layers": None,
    "norm_topk_prob": False, "use_sliding_window": False, "sliding_window": 4096,
}  # fmt: skip

FAMILY = Family(
    model_type="qwen3_moe",
    arch="qwen3moe",
    published="Qwen3-30B-A3B",
    qk_norm="head",
    renormalise=True,
    defaults=DEFAULTS,
    own={"num_experts": ("num_experts", "num_local_experts")},
    gguf_divided=True,
    configured=configured,
)
