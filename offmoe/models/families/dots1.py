"""dots.llm1: sigmoid router with a correction bias, shared experts, first layers dense, q and k normed per head."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.fields import number
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.shared_fields import balanced_by_bias, first_dense, shared_experts


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    config = balanced_by_bias(raw, first_dense(raw, config))
    return shared_experts(raw, config, int(number(raw, "n_shared_experts", 0)))


FAMILY = Family(
    model_type="dots1",
    arch="dots1",
    published="dots.llm1",
    qk_norm="head",
    renormalise=False,
    configured=configured,
    implemented={
        "sliding_window": (),  # kept in configs whose layers are all of full attention
        "n_shared_experts": (),
        "first_k_dense_replace": (),
        "routed_scaling_factor": (),
        "n_group": (),
        "expert_gating_func": (2,),
        "scoring_func": ("sigmoid", "noaux_tc", None),
        "topk_method": ("noaux_tc", None),
    },
)
