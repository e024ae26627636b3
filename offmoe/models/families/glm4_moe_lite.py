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


FAMILY = replace(
    deepseek_v3.FAMILY, model_type="glm4_moe_lite", published="GLM-4.7-Flash", priority=0, configured=configured
)
