"""Qwen3.5 and 3.6 MoE (35B-A3B, 122B-A10B, 397B-A17B): the layers of Qwen3-Next, its projections apart, inside a model
that also sees. Its language model is run: for text the positions of the three axes are one."""

from collections.abc import Mapping
from typing import Any

from offmoe.errors import OffmoeError
from offmoe.models import qwen3_next
from offmoe.models.config import ModelConfig
from offmoe.models.family import HF_NAMES


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the language model stand in a table of their own, where the file is not of that alone."""
    text = raw.get("text_config", {})
    if not isinstance(text, Mapping):
        raise OffmoeError("text_config in the model's config is no table")
    return {**raw, **text}


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """The axes share the rotated pairs as they do in the published models; for text it makes no difference."""
    pairs = config.rotary // 2
    return {**qwen3_next.gguf_keys(config), "rope.dimension_sections": [*((pairs + 2 - i) // 3 for i in range(3)), 0]}


FAMILY = qwen3_next.sibling(
    model_type="qwen3_5_moe",
    arch="qwen35moe",
    published="Qwen3.6-35B-A3B",
    names={
        role: tuple(form for name in names for form in (name, name.replace("model.", "model.language_model.", 1)))
        for role, names in HF_NAMES.items()
    },
    gguf_names=qwen3_next.GGUF,
    gguf_keys=gguf_keys,
    tiled_gguf=True,
    translated=translated,
)
