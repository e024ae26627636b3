"""Qwen3.5 and 3.6 MoE (35B-A3B, 122B-A10B, 397B-A17B): the layers of Qwen3-Next, its projections apart, inside a model
with vision. Only its language model is run: for text the positions of the three axes are one."""

from typing import Any

from offmoe.models.config import ModelConfig
from offmoe.models.families import qwen3_next


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """The axes share the rotated pairs as they do in the published models; for text it makes no difference."""
    assert config.heads.rope
    pairs = config.heads.rope.rotary // 2
    return {**qwen3_next.gguf_keys(config), "rope.dimension_sections": [*((pairs + 2 - i) // 3 for i in range(3)), 0]}


DEFAULTS = {
    "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "num_experts": 256, "num_experts_per_tok": 8,
    "moe_intermediate_size": 512, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "partial_rotary_factor": 0.25, "shared_expert_intermediate_size": 512,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "layer_types": None,
    "full_attention_interval": 4,
}  # fmt: skip

FAMILY = qwen3_next.sibling(
    model_type="qwen3_5_moe",
    arch="qwen35moe",
    published="Qwen3.6-35B-A3B",
    gguf_names=qwen3_next.GGUF,
    gguf_keys=gguf_keys,
    tiled_gguf=True,
    defaults=DEFAULTS,
    outer={"tie_word_embeddings": False},
)
