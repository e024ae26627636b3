"""Gemma 4 (26B-A4B): every layer has a shared expert of its own width and norms around all parts; layers of full
attention have fewer and wider heads, whose values are their keys. Only its language model is run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.checkpoint.fields import count, flag, number
from offmoe.errors import OffmoeError
from offmoe.kernels.feed_forward import GELU
from offmoe.kernels.rope import PROPORTIONAL, Scaling
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.mixers.recurrent import FULL
from offmoe.mixers.rope import RopeConfig
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import GGUF_NAMES, HF_NAMES, feed_forward
from offmoe.models.rope import GGUF_FACTORS, gguf_scaling
from offmoe.models.shared_fields import SLIDING, sliding_windows, windowed

SHARE = 0.25  # rotated share of a wide head's pairs in every published model
RESTS = 1e20  # a GGUF divides the frequencies of pairs that are not rotated by 1e30
LAYER = "model.layers.{l}."
NAMES = {
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
    "routed_post_norm": ("post_feedforward_layernorm_2.weight",),
    "ffn_post_norm": ("post_feedforward_layernorm.weight",),
    "layer_scale": ("layer_scalar",),
}
ROPES = {SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
         FULL: {"rope_type": PROPORTIONAL, "partial_rotary_factor": SHARE, "rope_theta": 1_000_000.0}}  # fmt: skip


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding of either kind of layer by itself. The last layer never has a window."""
    ropes, kinds = raw.get("rope_parameters") or ROPES, raw.get("layer_types")
    if not isinstance(ropes, Mapping) or not all(isinstance(ropes.get(kind), Mapping) for kind in ROPES):
        raise OffmoeError(
            f"gemma4: rope_parameters is {quote(ropes)}: expected a table for {SLIDING} and one for {FULL}"
        )
    return {
        **raw,
        "layer_types": [*kinds[:-1], FULL] if isinstance(kinds, list) and kinds else kinds,
        "rope_parameters": ropes[SLIDING],
        "full_rope": ropes[FULL] if raw.get("rope_factors") is None else factored(ropes[FULL], raw["rope_factors"]),
        "full_rope_type": ropes[FULL].get("rope_type"),
    }


def factored(rope: Mapping[str, Any], factors: list[float]) -> dict[str, Any]:
    """`rope` with the share of pairs that a GGUF's factors leave rotated."""
    rotated = [factor for factor in factors if factor < RESTS]
    if set(rotated) != {1.0} or factors[: len(rotated)] != rotated:
        raise OffmoeError(f"{GGUF_FACTORS} is {quote(factors)}: expected ones, then factors that leave no turn")
    return {**rope, "partial_rotary_factor": len(rotated) / len(factors)}


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Layers with a window have the config's heads, the others heads of their own."""
    full, heads, layers = raw["full_rope"], count(raw, "num_attention_heads"), config.layers
    kinds = [SLIDING if (layer + 1) % 6 and layer + 1 < layers else FULL for layer in range(layers)]
    windows = sliding_windows(raw, config, kinds)
    width = full_field(raw, "head_dim") or count(raw, "global_head_dim", default=512)
    shared = ["num_global_key_value_heads"] if flag(raw, "attention_k_eq_v", False) else []
    kept = full_field(raw, "num_key_value_heads") or count(raw, *shared, "num_key_value_heads", default=heads)
    scaling = Scaling(PROPORTIONAL, share=number(full, "partial_rotary_factor", 1.0))
    rope = RopeConfig(width, number(full, "rope_theta", 1_000_000.0), scaling)
    config = windowed(config.with_heads(scale=1.0, value_norm=True), windows)
    unwindowed = [layer for layer, window in enumerate(windows) if not window]
    config = config.with_heads(unwindowed, kv_heads=kept, head_dim=width, rope=rope)
    config = config.with_norm(sandwich=True).with_stream(
        embed_scale=config.hidden**0.5, logit_cap=number(raw, "final_logit_softcapping", 0.0)
    )
    return config.with_moe(
        glu=GELU, shared=1, shared_hidden=count(raw, "intermediate_size"), rule=replace(config.moe.rule, scaled=True)
    )


def full_field(raw: Mapping[str, Any], name: str) -> Any:
    """Field of the layers without a window, as newer configs have it: a table of differences by layer."""
    each = raw.get("per_layer_config")
    found = [own.get(name) for own in each.values() if isinstance(own, Mapping)] if isinstance(each, Mapping) else []
    return next((count({name: value}, name) for value in found if value is not None), None)


def gguf_fields(key: Callable[[str], Any]) -> dict[str, Any]:
    """Fields of config.json for which a GGUF has keys of this arch alone."""
    kept, near = key("attention.head_count_kv"), key("attention.sliding_window_pattern")
    if not isinstance(near, list) or not all(isinstance(one, bool) for one in near):
        raise OffmoeError(f"gemma4.attention.sliding_window_pattern is {quote(near)}: expected true or false a layer")
    each = kept if isinstance(kept, list) else [kept] * len(near)
    of_kind = {one: next((n for n, at in zip(each, near, strict=False) if at == one), None) for one in (True, False)}
    theta = key("rope.freq_base") or 10_000.0
    bases = {SLIDING: key("rope.freq_base_swa") or theta, FULL: theta}
    cap = key("final_logit_softcapping")
    return {
        "layer_types": [SLIDING if one else FULL for one in near],
        "head_dim": key("attention.key_length_swa"),
        "global_head_dim": key("attention.key_length"),
        "num_key_value_heads": of_kind[True],
        "num_global_key_value_heads": of_kind[False],
        "attention_k_eq_v": True,
        "sliding_window": key("attention.sliding_window"),
        "rope_parameters": {kind: {**ROPES[kind], "rope_theta": base} for kind, base in bases.items()},
        "final_logit_softcapping": 30.0 if cap is None else cap,
        "hidden_size_per_layer_input": key("embedding_length_per_layer_input") or 0,
        "num_kv_shared_layers": key("attention.shared_kv_layers") or 0,
        "rope_scaling": gguf_scaling(key, {}),
        "n_shared_experts": None,
    }


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    heads = [mixer for mixer in config.mixers if isinstance(mixer, HeadsConfig)]
    near = next((own for own in heads if own.window), heads[0])
    full = next((own for own in heads if not own.window), heads[0])
    assert near.rope
    assert full.rope
    return {
        "attention.head_count_kv": [own.kv_heads for own in heads],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": near.head_dim,
        "attention.value_length_swa": near.head_dim,
        "attention.sliding_window": near.window,
        "attention.sliding_window_pattern": [bool(own.window) for own in heads],
        "attention.shared_kv_layers": 0,
        "rope.dimension_count": full.rope.rotary,
        "rope.dimension_count_swa": near.rope.rotary,
        "rope.freq_base": full.rope.theta,
        "rope.freq_base_swa": near.rope.theta,
        "feed_forward_length": config.moe.shared_hidden,
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": config.stream.logit_cap,
    }


DEFAULTS = {
    "vocab_size": 262144, "hidden_size": 2304, "num_hidden_layers": 30, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "num_experts": None, "num_experts_per_tok": None,
    "moe_intermediate_size": None, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "global_head_dim": 512, "num_global_key_value_heads": None,
    "attention_k_eq_v": False, "per_layer_config": None, "intermediate_size": 9216, "sliding_window": 512,
    "layer_types": None, "final_logit_softcapping": None, "enable_moe_block": False,
    "hidden_size_per_layer_input": 256,
}  # fmt: skip

FAMILY = Family(
    model_type="gemma4",
    arch="gemma4",
    published="Gemma-4-26B-A4B",
    qk_norm="head",
    renormalise=True,
    defaults=DEFAULTS,
    own={"num_experts_per_tok": ("top_k_experts", "num_experts_per_tok")},
    outer={"tie_word_embeddings": True},
    names={
        **HF_NAMES,
        **feed_forward("", "moe."),
        **{role: tuple(LAYER + name for name in own) for role, own in NAMES.items()},
    },
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
    configured=configured,
    implemented={
        "hidden_activation": ("gelu_pytorch_tanh", "gelu_new"),
        "hidden_act": (),  # hidden_activation is
        "layer_types": (FULL, SLIDING),
        "enable_moe_block": (True, None),
        "hidden_size_per_layer_input": (0, None),
        "num_kv_shared_layers": (0, None),
        "use_bidirectional_attention": (None, "vision"),
        "full_rope_type": (PROPORTIONAL,),
    },
)
