"""Qwen3-Next (80B-A3B): three of four layers are gated DeltaNet, the others attention with gated heads, a quarter of
each rotated; 512 experts and a gated shared one. Weights of RMS norms are stored as differences from 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from offmoe.checkpoint.fields import count
from offmoe.errors import OffmoeError
from offmoe.mixers.deltanet.config import DeltaConfig
from offmoe.mixers.recurrent import FULL, layers_of_kind
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import GGUF_NAMES
from offmoe.models.shared_fields import sparse_layers

LINEAR = "linear_attention"  # a kind of layer
GGUF = {**GGUF_NAMES, "ffn_norm": ("blk.{l}.post_attention_norm.weight",)}


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Qwen3.5 and 3.6 share it: their configs have the same fields, some of them left out."""
    delta = DeltaConfig.from_fields(raw, config.norm.eps)
    config = sparse_layers(raw, config).with_moe(
        shared=1, shared_hidden=count(raw, "shared_expert_intermediate_size"), shared_gated=True
    )
    return config.with_heads(gated=True).with_mixers(dict.fromkeys(linear_layers(raw, config.layers), delta))


def linear_layers(raw: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Layers that are DeltaNet: by layer_types, or all but every full_attention_interval-th."""
    kinds, every = raw.get("layer_types"), count(raw, "full_attention_interval", default=4)
    if kinds is None:
        kinds = [LINEAR if (layer + 1) % every else FULL for layer in range(layers)]
    return layers_of_kind(kinds, layers, LINEAR)


def from_one(weight: Tensor) -> Tensor:
    """Weights of a norm that are stored as their difference from 1."""
    return weight + 1


def below_zero(logarithm: Tensor) -> Tensor:
    """Decay rates, stored as the logarithm of their absolute value."""
    return -logarithm.exp()


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """Raises OffmoeError where attention is not in every n-th layer."""
    every = attention_interval(config)
    if every is None:
        raise OffmoeError(
            f"{config.model_type} with DeltaNet in the layers {config.recurrent} cannot be packed: "
            "in a GGUF every n-th layer has attention, and no other"
        )
    return {"full_attention_interval": every}


def attention_interval(config: ModelConfig) -> int | None:
    """The n for which every n-th layer, and no other, has attention."""
    every = range(1, config.layers + 1)
    return next((n for n in every if config.attended == tuple(range(n - 1, config.layers, n))), None)


DEFAULTS = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10,
    "moe_intermediate_size": 512, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "partial_rotary_factor": 0.25, "intermediate_size": 5632,
    "decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": True,
    "shared_expert_intermediate_size": 512, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "layer_types": None,
    "full_attention_interval": 4,
}  # fmt: skip

FAMILY = Family(
    model_type="qwen3_next",
    arch="qwen3next",
    published="Qwen3-Next-80B-A3B-Instruct",
    qk_norm="head",
    renormalise=True,
    defaults=DEFAULTS,
    gguf_names={role: names for role, names in GGUF.items() if role not in ("delta_b", "delta_a")},
    gguf_keys=gguf_keys,
    values={
        **dict.fromkeys(("attn_norm", "ffn_norm", "final_norm", "q_norm", "k_norm"), from_one),
        "delta_decay": below_zero,
    },
    gguf_divided=True,
    configured=configured,
    implemented={
        "layer_types": (FULL, LINEAR),
        "partial_rotary_factor": (),
        "shared_expert_intermediate_size": (),
        "attn_output_gate": (True, None),
    },
)


def sibling(**changes: Any) -> Family:
    """A family with the same layers."""
    return replace(FAMILY, **changes)
