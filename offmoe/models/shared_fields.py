"""Parts of a ModelConfig that several families read from the same fields of a config.json.

Each function takes the fields and a config, and returns the config completed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.checkpoint.fields import count, number
from offmoe.errors import OffmoeError
from offmoe.mixers.latent.config import LatentConfig
from offmoe.models.config import ModelConfig

SLIDING = "sliding_attention"  # a kind of layer


def sparse_layers(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Qwen's layers with experts: every decoder_sparse_step-th, but for those of mlp_only_layers."""
    layers, step = config.layers, count(raw, "decoder_sparse_step", default=1)
    listed = raw.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(layer) is int and 0 <= layer < layers for layer in listed):
        raise OffmoeError(
            f"the model's config gives mlp_only_layers = {quote(listed)}: expected layers of 0 to {layers - 1}"
        )
    return routed_layers(
        raw, config, tuple(layer for layer in range(layers) if layer not in listed and (layer + 1) % step == 0)
    )


def first_dense(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """The first layers have no experts."""
    dense = count(raw, "first_k_dense_replace", default=0, least=0)
    return routed_layers(raw, config, tuple(range(dense, config.layers)))


def routed_layers(raw: Mapping[str, Any], config: ModelConfig, routed: tuple[int, ...]) -> ModelConfig:
    """These layers have experts, the others a dense part of intermediate_size."""
    dense = count(raw, "intermediate_size") if len(routed) < config.layers else 0
    return config.with_moe(routed=routed, dense_hidden=dense)


def shared_experts(raw: Mapping[str, Any], config: ModelConfig, shared: int) -> ModelConfig:
    """`shared` experts that every token passes, each as wide as a routed one."""
    return config.with_moe(shared=shared, shared_hidden=shared * count(raw, "moe_intermediate_size"))


def sliding_windows(raw: Mapping[str, Any], config: ModelConfig, default: Sequence[str]) -> tuple[int, ...]:
    """Window of each layer, by layer_types or else `default`: sliding_window positions, or 0 for all positions."""
    kinds = raw.get("layer_types") or list(default)
    if len(kinds) != config.layers:
        raise OffmoeError(
            f"the model's config gives {len(kinds)} layer_types: expected one for each of {config.layers} layers"
        )
    return tuple(count(raw, "sliding_window") if kind == SLIDING else 0 for kind in kinds)


def one_window(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """The same window in every layer; one as wide as the context hides nothing."""
    window = count(raw, "sliding_window", default=config.ctx)
    return config.with_heads(window=window) if window < config.ctx else config


def windowed(config: ModelConfig, windows: Sequence[int]) -> ModelConfig:
    """The attention heads of each layer with its window; 0: none."""
    for layer, window in enumerate(windows):
        config = config.with_heads((layer,), window=window)
    return config


def balanced_by_bias(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """DeepSeek-V3's routing (arXiv 2412.19437), which many families took over."""
    rule = replace(
        config.moe.rule, scores="sigmoid", biased=True, group_best=2, groups=count(raw, "n_group", default=1),
        kept=count(raw, "topk_group", default=1), scale=number(raw, "routed_scaling_factor", 1.0),
    )  # fmt: skip
    return config.with_moe(rule=rule)


def latent_attention(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Latent attention in every layer."""
    mixer = LatentConfig.from_fields(raw, config.heads)
    return config.with_mixers(dict.fromkeys(range(config.layers), mixer))
