"""dots.llm1: sigmoid router with a correction bias, shared experts, first layers dense, q and k normed per head."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.fields import count
from offmoe.mixers.recurrent import FULL
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.shared_fields import (
    SLIDING,
    balanced_by_bias,
    first_dense,
    shared_experts,
    sliding_windows,
    windowed,
)


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Layers from max_window_layers on have a window: in the published model none."""
    config = shared_experts(raw, balanced_by_bias(raw, first_dense(raw, config)), count(raw, "n_shared_experts"))
    if raw.get("sliding_window") is None:
        return config
    first = count(raw, "max_window_layers", least=0)
    kinds = [SLIDING if layer >= first else FULL for layer in range(config.layers)]
    return windowed(config, sliding_windows(raw, config, kinds))


DEFAULTS = {
    "vocab_size": 152064, "hidden_size": 4608, "num_hidden_layers": 62, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": None, "num_experts": None, "num_experts_per_tok": None,
    "moe_intermediate_size": 1408, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "intermediate_size": 10944, "first_k_dense_replace": 0, "n_shared_experts": None,
    "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "sliding_window": 4096,
    "max_window_layers": 62, "layer_types": None,
}  # fmt: skip

FAMILY = Family(
    model_type="dots1",
    arch="dots1",
    published="dots.llm1",
    qk_norm="head",
    renormalise=False,
    defaults=DEFAULTS,
    own={"num_experts": ("n_routed_experts", "num_local_experts")},
    configured=configured,
    implemented={
        "layer_types": (FULL, SLIDING),
        "n_shared_experts": (),
        "first_k_dense_replace": (),
        "routed_scaling_factor": (),
        "n_group": (),
        "expert_gating_func": (2,),
        "scoring_func": ("sigmoid", "noaux_tc", None),
        "topk_method": ("noaux_tc", None),
    },
)
