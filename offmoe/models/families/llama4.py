"""Llama 4 (Scout 109B-A17B, Maverick 400B-A17B), text only: three of four layers rotate and see a chunk of 8,192
positions, the fourth does neither and has an attention temperature. One expert a token, whose weight, a sigmoid, scales
its input, and a shared one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.checkpoint.fields import LARGEST, count, flag, number
from offmoe.errors import OffmoeError
from offmoe.kernels.rope import AttentionTemperature
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.mixers.recurrent import FULL
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import HF_NAMES, feed_forward
from offmoe.models.shared_fields import routed_layers, windowed

CHUNKED = "chunked_attention"  # a kind of layer
# Of the published models; llama.cpp has them fixed.
CHUNK, EVERY, TEMPERATURE = 8192, 4, AttentionTemperature(8192, 0.1)
UNNORMED = 128  # experts of the model whose heads are not normed: llama.cpp knows it by that number
OWN = {  # intermediate_size is an expert's, not a dense layer's
    "num_experts": ("num_local_experts",),
    "moe_intermediate_size": ("intermediate_size",),
    "intermediate_size": ("intermediate_size_mlp",),
}


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    layers = config.layers
    rotates = each_layer(raw, "no_rope_layers", layers, (0, 1)) or [
        int((layer + 1) % count(raw, "no_rope_layer_interval", default=EVERY) != 0) for layer in range(layers)
    ]
    kinds = each_layer(raw, "layer_types", layers, (FULL, CHUNKED)) or [CHUNKED if one else FULL for one in rotates]
    chunk = count(raw, "attention_chunk_size", default=CHUNK) if raw.get("sliding_window") != 0 else 0
    temperature = None
    if flag(raw, "attn_temperature_tuning", True):
        floor = count(raw, "floor_scale", default=TEMPERATURE.floor)
        temperature = AttentionTemperature(floor, number(raw, "attn_scale", TEMPERATURE.scale))
    config = routed_layers(raw, config, layers_with_experts(raw, layers)).with_moe(
        rule=replace(config.moe.rule, scores="sigmoid", renormalise=False),
        shared=1,
        shared_hidden=count(raw, "moe_intermediate_size"),
        weighted_input=True,
    )
    config = config.with_heads(
        chunked=bool(chunk) and CHUNKED in kinds, qk_norm="unit" if flag(raw, "use_qk_norm", True) else "none"
    )
    config = windowed(config, [chunk if kind == CHUNKED else 0 for kind in kinds])
    no_rope = [layer for layer, one in enumerate(rotates) if not one]
    return config.with_heads(no_rope, rope=None, temperature=temperature)


def each_layer(raw: Mapping[str, Any], name: str, layers: int, among: tuple[Any, ...]) -> list[Any]:
    """A list with one of `among` for each layer; empty where the config has none."""
    values = raw.get(name) or []
    if not isinstance(values, list) or len(values) not in (0, layers) or not all(value in among for value in values):
        raise OffmoeError(
            f"{name} is {quote(values)}: expected {among[0]!r} or {among[1]!r} for each of {layers} layers"
        )
    return values


def layers_with_experts(raw: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """By the list moe_layers, or every interleave_moe_layer_step-th."""
    step, listed = count(raw, "interleave_moe_layer_step", default=1), raw.get("moe_layers")
    if listed is None:
        return tuple(range(step - 1, layers, step))
    if not isinstance(listed, list) or not all(type(layer) is int and 0 <= layer < layers for layer in listed):
        raise OffmoeError(f"moe_layers is {quote(listed)}: expected layers of 0 to {layers - 1}")
    return tuple(sorted(set(listed)))


def gguf_fields(key: Callable[[str], Any]) -> dict[str, Any]:
    """Return what llama.cpp fixes: heads are normed but in one model, and without a window all layers rotate."""
    fixed, unwindowed = {"use_qk_norm": key("expert_count") != UNNORMED}, key("attention.sliding_window") == 0
    return fixed | {"sliding_window": 0, "no_rope_layer_interval": LARGEST} if unwindowed else fixed


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """Raises OffmoeError where the model differs from those whose numbers llama.cpp has built in."""
    c, no_rope = config, tuple(range(EVERY - 1, config.layers, EVERY))
    heads = [mixer for mixer in c.mixers if isinstance(mixer, HeadsConfig)]
    windows, step = tuple(0 if layer in no_rope else CHUNK for layer in range(c.layers)), c.routed[0] + 1
    said = {
        "no_rope_layers": tuple(layer for layer, own in enumerate(heads) if not own.rope) == no_rope,
        "attention_chunk_size": c.windows == windows,
        "attn_temperature_tuning": all(own.temperature == TEMPERATURE for own in heads if not own.rope),
        "use_qk_norm": (c.heads.qk_norm == "unit") == (c.experts != UNNORMED),
        "moe_layers": c.routed == tuple(range(step - 1, c.layers, step)),
    }
    if wrong := [name for name, fits in said.items() if not fits]:
        raise OffmoeError(
            f"llama4 with its {wrong[0]} cannot be packed: a GGUF has no key for it, and llama.cpp means another"
        )
    return {"interleave_moe_layer_step": step}


DEFAULTS = {
    "vocab_size": 202048, "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40,
    "num_key_value_heads": 8, "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8192, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    "tie_word_embeddings": False, "intermediate_size": 16384, "moe_layers": None, "interleave_moe_layer_step": 1,
    "no_rope_layers": None, "no_rope_layer_interval": 4, "layer_types": None, "attention_chunk_size": 8192,
    "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1, "use_qk_norm": True,
}  # fmt: skip

FAMILY = Family(
    model_type="llama4",
    arch="llama4",
    published="Llama-4-Scout-17B-16E-Instruct",
    qk_norm="unit",
    renormalise=False,
    defaults=DEFAULTS,
    own=OWN,
    names={**HF_NAMES, **feed_forward("feed_forward.", router="router")},
    interleaved=True,
    transposed_experts=True,
    dense_first=False,
    gguf_factors=True,
    gguf_fields=gguf_fields,
    gguf_keys=gguf_keys,
    configured=configured,
    implemented={
        "layer_types": (CHUNKED, FULL),
        "num_experts_per_tok": (1,),
        "expert_gating_func": (2, 1, 0),
        "n_shared_experts": (),
    },
)
