"""MiniMax M2 (230B-A10B): sigmoid router with a correction bias, half a head rotated, q and k normed over all heads."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.fields import count
from offmoe.models.config import ModelConfig
from offmoe.models.families.mixtral import NAMES
from offmoe.models.family import Family


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`rotary_dim` as a share of a head; attention of type 1 is full."""
    kinds = raw.get("attn_type_list") or []
    return {
        "partial_rotary_factor": count(raw, "rotary_dim") / count(raw, "head_dim") if raw.get("rotary_dim") else None,
        **raw,
        "attn_type_list": next((kind for kind in kinds if kind != 1), 1) if isinstance(kinds, list) else kinds,
    }


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    return config.with_moe(rule=replace(config.moe.rule, scores="sigmoid", biased=True))


DEFAULTS = {
    "vocab_size": 200064, "hidden_size": 3072, "num_hidden_layers": 62, "num_attention_heads": 48,
    "num_key_value_heads": 8, "head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536, "max_position_embeddings": 196608, "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000.0, "tie_word_embeddings": False, "rotary_dim": None,
}  # fmt: skip

FAMILY = Family(
    model_type="minimax_m2",
    arch="minimax-m2",
    published="MiniMax-M2",
    qk_norm="full",
    renormalise=True,
    defaults=DEFAULTS,
    own={"num_experts": ("num_local_experts", "num_experts"), "moe_intermediate_size": ("intermediate_size",)},
    names=NAMES,
    translated=translated,
    configured=configured,
    implemented={
        "partial_rotary_factor": (),
        "expert_gating_func": (2,),
        "scoring_func": ("sigmoid", None),
        "attn_type_list": (1,),
        "use_qk_norm": (True, None),
        "qk_norm_type": ("per_layer", None),
        "shared_intermediate_size": (0, None),
    },
)
