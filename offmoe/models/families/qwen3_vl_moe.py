"""Qwen3-VL MoE (30B-A3B, 235B-A22B): the layers of Qwen3 MoE, experts stacked, inside a model with vision. Only its
language model is run: for text the positions of the three axes are one."""

from dataclasses import replace
from typing import Any

from offmoe.checkpoint.fields import text_fields
from offmoe.models.config import ModelConfig
from offmoe.models.families import qwen3_moe
from offmoe.models.names import HF_NAMES, with_vision


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """The axes share the rotated pairs as they do in the published models; for text it makes no difference."""
    assert config.heads.rope
    pairs = config.heads.rope.rotary // 2
    side = pairs * 5 // 16
    return {"rope.dimension_sections": [pairs - 2 * side, side, side, 0]}


FAMILY = replace(
    qwen3_moe.FAMILY,
    model_type="qwen3_vl_moe",
    arch="qwen3vlmoe",
    published="Qwen3-VL-30B-A3B-Instruct",
    names=with_vision(HF_NAMES),
    rope_theta=5_000_000.0,
    transposed_experts=True,
    translated=text_fields,
    gguf_keys=gguf_keys,
    implemented={**qwen3_moe.FAMILY.implemented, "norm_topk_prob": (True, None)},
)
