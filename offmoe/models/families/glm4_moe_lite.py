"""GLM-4.7-Flash: DeepSeek-V3's layers with narrower heads, one of them dense; the config may list them one by one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.checkpoint.fields import count
from offmoe.errors import OffmoeError
from offmoe.models.config import ModelConfig
from offmoe.models.families import deepseek_v3
from offmoe.models.shared_fields import routed_layers


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    layers, config = config.layers, deepseek_v3.configured(raw, config)
    kinds = raw.get("mlp_layer_types") or ["dense"] * count(raw, "first_k_dense_replace", default=1)
    kinds = [*kinds, *["sparse"] * (layers - len(kinds))] if isinstance(kinds, list) else [kinds]
    if len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise OffmoeError(
            f"the model's config gives mlp_layer_types = {quote(kinds)}: expected dense or sparse a layer"
        )
    return routed_layers(raw, config, tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse"))


DEFAULTS = {
    "vocab_size": 154880, "hidden_size": 2048, "num_hidden_layers": 47, "num_attention_heads": 20,
    "num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": False, "intermediate_size": 10240,
    "n_shared_experts": 1, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "v_head_dim": 256, "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "mlp_layer_types": None,
}  # fmt: skip

FAMILY = replace(
    deepseek_v3.FAMILY,
    model_type="glm4_moe_lite",
    published="GLM-4.7-Flash",
    priority=0,
    defaults=DEFAULTS,
    configured=configured,
)
