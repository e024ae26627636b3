"""Fields of ModelConfig that several families have, out of a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.base import shown
from offmoe.errors import OffmoeError
from offmoe.kernels.mla import Latent
from offmoe.kernels.route import Rule
from offmoe.models.fields import count, number

SLIDING = "sliding_attention"  # a kind of layer


def sparse_layers(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`routed` and `dense_hidden` of the Qwen families: every so many layers has experts, but for a list."""
    step, listed = count(raw, "decoder_sparse_step", default=1), raw.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(layer) is int and 0 <= layer < layers for layer in listed):
        raise OffmoeError(
            f"the model's config gives mlp_only_layers = {shown(listed)}: expected layers of 0 to {layers - 1}"
        )
    routed = tuple(layer for layer in range(layers) if layer not in listed and (layer + 1) % step == 0)
    return {"routed": routed, "dense_hidden": count(raw, "intermediate_size") if len(routed) < layers else 0}


def first_dense(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`routed` and `dense_hidden` where the first layers have no experts."""
    dense = int(number(raw, "first_k_dense_replace", 0))
    return {"routed": tuple(range(dense, layers)), "dense_hidden": count(raw, "intermediate_size") if dense else 0}


def shared_experts(raw: Mapping[str, Any], shared: int) -> dict[str, Any]:
    """`shared` experts that every token passes, each as wide as a routed one."""
    return {"shared": shared, "shared_hidden": shared * count(raw, "moe_intermediate_size")}


def sliding_windows(raw: Mapping[str, Any], layers: int, default: Sequence[str]) -> tuple[int, ...]:
    """`windows`, of layer_types: every layer looks at all positions or at sliding_window of them."""
    kinds = raw.get("layer_types") or list(default)
    if len(kinds) != layers:
        raise OffmoeError(
            f"the model's config gives {len(kinds)} layer_types: expected one for each of {layers} layers"
        )
    return tuple(count(raw, "sliding_window") if kind == SLIDING else 0 for kind in kinds)


def balanced_by_bias(raw: Mapping[str, Any], rule: Rule) -> Rule:
    """DeepSeek-V3's (arXiv 2412.19437), which many took over."""
    return replace(
        rule, scores="sigmoid", biased=True, group_best=2, groups=count(raw, "n_group", default=1),
        kept=count(raw, "topk_group", default=1), scale=number(raw, "routed_scaling_factor", 1.0),
    )  # fmt: skip


def latent_attention(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Multi-head latent attention, as DeepSeek-V2 has it and others took it over."""
    latent = Latent(
        q_rank=count(raw, "q_lora_rank", default=0),
        kv_rank=count(raw, "kv_lora_rank"),
        qk_nope=count(raw, "qk_nope_head_dim"),
        qk_rope=count(raw, "qk_rope_head_dim"),
        value=count(raw, "v_head_dim"),
    )
    return {"latent": latent, "kv_heads": 1, "head_dim": latent.key, "rotary": latent.qk_rope}
