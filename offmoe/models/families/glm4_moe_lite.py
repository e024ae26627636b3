"""GLM-4.7-Flash: DeepSeek-V3's layers with narrower heads, one of them dense; the config may list them one by one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.base import shown
from offmoe.errors import OffmoeError
from offmoe.kernels.route import Rule
from offmoe.models.families import deepseek_v3
from offmoe.models.fields import count


def fields(raw: Mapping[str, Any], layers: int, rule: Rule) -> dict[str, Any]:
    kinds = raw.get("mlp_layer_types") or ["dense"] * count(raw, "first_k_dense_replace", default=1)
    kinds = [*kinds, *["sparse"] * (layers - len(kinds))] if isinstance(kinds, list) else [kinds]
    if len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise OffmoeError(
            f"the model's config gives mlp_layer_types = {shown(kinds)}: expected dense or sparse a layer"
        )
    routed = tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")
    dense = count(raw, "intermediate_size") if len(routed) < layers else 0
    return {**deepseek_v3.fields(raw, layers, rule), "routed": routed, "dense_hidden": dense}


FAMILY = replace(deepseek_v3.FAMILY, model_type="glm4_moe_lite", published="GLM-4.7-Flash", fields=fields)
