"""Gemma 4 (26B-A4B): in each layer a part for every token beside the experts, norms around all of them; layers that see
all positions have fewer and wider heads, whose values are their keys. Its language model is run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.base import shown
from offmoe.errors import OffmoeError
from offmoe.kernels.feed_forward import GELU
from offmoe.kernels.rope import PROPORTIONAL, Scaling
from offmoe.kernels.route import Rule
from offmoe.models.config import Heads, ModelConfig
from offmoe.models.family import GGUF_NAMES, HF_NAMES, Family, experts_apart, with_vision
from offmoe.models.fields import count, number, text_fields
from offmoe.models.recurrent import FULL
from offmoe.models.rope import GGUF_FACTORS
from offmoe.models.shared_fields import SLIDING, sliding_windows

SHARE = 0.25  # of a wide head's pairs are turned in every published model
RESTS = 1e20  # a GGUF divides the frequencies of pairs that are not turned by 1e30
LAYER = "model.layers.{l}."
APART = experts_apart("experts", "moe.experts")
NAMES = {
    **APART,
    "attn_post_norm": ("post_attention_layernorm.weight",),
    "v": ("self_attn.v_proj.weight", "self_attn.k_proj.weight"),
    "shared_norm": ("pre_feedforward_layernorm.weight",),
    "shared_gate": ("mlp.gate_proj.weight",),
    "shared_up": ("mlp.up_proj.weight",),
    "shared_down": ("mlp.down_proj.weight",),
    "shared_post_norm": ("post_feedforward_layernorm_1.weight",),
    "ffn_norm": ("pre_feedforward_layernorm_2.weight",),
    "router": ("router.proj.weight",),
    "router_gain": ("router.scale",),
    "router_factors": ("router.per_expert_scale",),
    "gate_up": ("experts.gate_up_proj",),
    "down": ("experts.down_proj", *APART["down"]),
    "routed_post_norm": ("post_feedforward_layernorm_2.weight",),
    "ffn_post_norm": ("post_feedforward_layernorm.weight",),
    "layer_scale": ("layer_scalar",),
}
ROPES = {SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
         FULL: {"rope_type": PROPORTIONAL, "partial_rotary_factor": SHARE, "rope_theta": 1_000_000.0}}  # fmt: skip


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's numbers, and the rotation of either kind of layer, each by itself."""
    ours = text_fields(raw)
    ropes = ours.get("rope_parameters") or ROPES
    if not isinstance(ropes, Mapping) or not all(isinstance(ropes.get(kind), Mapping) for kind in ROPES):
        raise OffmoeError(
            f"gemma4: rope_parameters is {shown(ropes)}: expected a table for {SLIDING} and one for {FULL}"
        )
    return {
        "tie_word_embeddings": True,
        **ours,
        "num_experts_per_tok": ours.get("top_k_experts", ours.get("num_experts_per_tok")),
        "rope_parameters": ropes[SLIDING],
        "far_rope": ropes[FULL] if raw.get("rope_factors") is None else factored(ropes[FULL], raw["rope_factors"]),
        "far_rope_type": ropes[FULL].get("rope_type"),
    }


def factored(rope: Mapping[str, Any], factors: list[float]) -> dict[str, Any]:
    """`rope` with the share of pairs that a GGUF's factors leave turned."""
    turned = [factor for factor in factors if factor < RESTS]
    if set(turned) != {1.0} or factors[: len(turned)] != turned:
        raise OffmoeError(f"{GGUF_FACTORS} is {shown(factors)}: expected ones, then factors that leave no turn")
    return {**rope, "partial_rotary_factor": len(turned) / len(factors)}


def fields(raw: Mapping[str, Any], layers: int, rule: Rule) -> dict[str, Any]:
    full_attention, heads, hidden = raw["far_rope"], count(raw, "num_attention_heads"), count(raw, "hidden_size")
    windows = sliding_windows(raw, layers, [SLIDING if (layer + 1) % 6 else FULL for layer in range(layers)])
    width = far_field(raw, "head_dim") or count(raw, "global_head_dim", default=512)
    kept = far_field(raw, "num_key_value_heads") or count(
        raw, "num_global_key_value_heads", "num_key_value_heads", default=heads
    )
    scaling = Scaling(PROPORTIONAL, share=number(full_attention, "partial_rotary_factor", 1.0))
    return {
        "windows": windows,
        "full_attention": Heads(heads, kept, width, width, number(full_attention, "rope_theta", 1_000_000.0), scaling),
        "embed_scale": hidden**0.5,
        "attention_scale": 1.0,
        "value_norm": True,
        "sandwich": True,
        "glu": GELU,
        "shared": 1,
        "shared_hidden": count(raw, "intermediate_size"),
        "rule": replace(rule, scaled=True),
        "logit_cap": number(raw, "final_logit_softcapping", 0.0),
    }


def far_field(raw: Mapping[str, Any], name: str) -> Any:
    """Of the layers that see all, as newer configs say it: a table of what differs by layer."""
    each = raw.get("per_layer_config")
    found = [own.get(name) for own in each.values() if isinstance(own, Mapping)] if isinstance(each, Mapping) else []
    return next((count({name: value}, name) for value in found if value is not None), None)


def gguf_fields(key: Callable[[str], Any]) -> dict[str, Any]:
    """`config.json`'s fields that GGUF has keys of this arch for."""
    kept, near = key("attention.head_count_kv"), key("attention.sliding_window_pattern")
    if not isinstance(near, list) or not all(isinstance(one, bool) for one in near):
        raise OffmoeError(f"gemma4.attention.sliding_window_pattern is {shown(near)}: expected true or false a layer")
    each = kept if isinstance(kept, list) else [kept] * len(near)
    of_kind = {one: next((n for n, at in zip(each, near, strict=False) if at == one), None) for one in (True, False)}
    rope = {kind: {**ROPES[kind], "rope_theta": key(name) or ROPES[kind]["rope_theta"]}
            for kind, name in ((SLIDING, "rope.freq_base_swa"), (FULL, "rope.freq_base"))}  # fmt: skip
    return {
        "layer_types": [SLIDING if one else FULL for one in near],
        "head_dim": key("attention.key_length_swa"),
        "global_head_dim": key("attention.key_length"),
        "num_key_value_heads": of_kind[True],
        "num_global_key_value_heads": of_kind[False],
        "rope_parameters": rope,
        "final_logit_softcapping": key("final_logit_softcapping"),
        "hidden_size_per_layer_input": key("embedding_length_per_layer_input") or 0,
        "num_kv_shared_layers": key("attention.shared_kv_layers") or 0,
        "n_shared_experts": None,
    }


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    near, full_attention = [bool(config.window(layer)) for layer in range(config.layers)], config.full_attention
    assert full_attention
    return {
        "attention.head_count_kv": [config.kv_heads if one else full_attention.kv_heads for one in near],
        "attention.key_length": full_attention.head_dim,
        "attention.value_length": full_attention.head_dim,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.sliding_window": max(config.windows),
        "attention.sliding_window_pattern": near,
        "attention.shared_kv_layers": 0,
        "rope.dimension_count": full_attention.rotary,
        "rope.dimension_count_swa": config.rotary,
        "rope.freq_base": full_attention.rope_theta,
        "rope.freq_base_swa": config.rope_theta,
        "feed_forward_length": config.shared_hidden,
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": config.logit_cap,
    }


FAMILY = Family(
    model_type="gemma4",
    arch="gemma4",
    published="Gemma-4-26B-A4B",
    qk_norm="head",
    renormalise=True,
    names=with_vision({**HF_NAMES, **{role: tuple(LAYER + name for name in own) for role, own in NAMES.items()}}),
    gguf_names={
        **GGUF_NAMES,
        "v": ("blk.{l}.attn_v.weight", "blk.{l}.attn_k.weight"),
        "ffn_norm": ("blk.{l}.pre_ffw_norm_2.weight",),
        "shared_gate": GGUF_NAMES["dense_gate"],
        "shared_up": GGUF_NAMES["dense_up"],
        "shared_down": GGUF_NAMES["dense_down"],
    },
    translated=translated,
    gguf_fields=gguf_fields,
    gguf_keys=gguf_keys,
    gguf_factors=True,
    fields=fields,
    implemented={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "layer_types": (FULL, SLIDING),
        "sliding_window": (),
        "enable_moe_block": (True, None),
        "hidden_size_per_layer_input": (0, None),
        "num_kv_shared_layers": (0, None),
        "use_bidirectional_attention": (None, "vision"),
        "far_rope_type": (PROPORTIONAL,),
    },
)
