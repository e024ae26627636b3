"""Qwen2 MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): QKV bias, a shared expert with a sigmoid gate."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.fields import count, flag
from offmoe.mixers.recurrent import FULL
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.shared_fields import SLIDING, sliding_windows, sparse_layers, windowed


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    shared = count(raw, "shared_expert_intermediate_size", "intermediate_size")
    biased = flag(raw, "qkv_bias", flag(raw, "attention_bias", True))
    config = sparse_layers(raw, config).with_moe(shared=1, shared_hidden=shared, shared_gated=True)
    config = config.with_heads(qkv_bias=biased)
    if not flag(raw, "use_sliding_window", False):
        return config
    last = count(raw, "max_window_layers", least=0)
    kinds = [SLIDING if layer < last and layer % 2 == 0 else FULL for layer in range(config.layers)]
    return windowed(config, sliding_windows(raw, config, kinds))


DEFAULTS = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": None, "num_experts": 60, "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "intermediate_size": 5632, "decoder_sparse_step": 1, "mlp_only_layers": None,
    "norm_topk_prob": False, "shared_expert_intermediate_size": 5632, "qkv_bias": True, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip

FAMILY = Family(
    model_type="qwen2_moe",
    arch="qwen2moe",
    published="Qwen1.5-MoE-A2.7B",
    qk_norm="none",
    renormalise=False,
    defaults=DEFAULTS,
    gguf_divided=True,
    configured=configured,
    implemented={
        "shared_expert_intermediate_size": (),
        "n_shared_experts": (),
        "attention_bias": (),  # what a GGUF says of the QKV bias
        "layer_types": (FULL, SLIDING),
    },
)
