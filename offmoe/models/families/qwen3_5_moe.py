"""Qwen3.5 and 3.6 MoE (35B-A3B, 122B-A10B, 397B-A17B): the layers of Qwen3-Next, its projections apart, inside a model
with vision. Only its language model is run: for text the positions of the three axes are one."""

from typing import Any

from offmoe.checkpoint.fields import text_fields
from offmoe.models.config import ModelConfig
from offmoe.models.families import qwen3_next
from offmoe.models.names import HF_NAMES, with_vision


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """The axes share the rotated pairs as they do in the published models; for text it makes no difference."""
    assert config.heads.rope
    pairs = config.heads.rope.rotary // 2
    return {**qwen3_next.gguf_keys(config), "rope.dimension_sections": [*((pairs + 2 - i) // 3 for i in range(3)), 0]}


FAMILY = qwen3_next.sibling(
    model_type="qwen3_5_moe",
    arch="qwen35moe",
    published="Qwen3.6-35B-A3B",
    names=with_vision(HF_NAMES),
    gguf_names=qwen3_next.GGUF,
    gguf_keys=gguf_keys,
    tiled_gguf=True,
    translated=text_fields,
)
