"""Hunyuan-A13B: a shared expert, q and k normed per head after they are rotated, a stretched rope_theta."""

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.checkpoint.fields import count, number
from offmoe.errors import OffmoeError
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import HF_NAMES
from offmoe.models.rope import rope_parameters

BLOCK = "model.layers.{l}"
OWN = {
    "num_experts": ("num_experts", "num_local_experts"),
    "num_experts_per_tok": ("moe_topk", "num_experts_per_tok"),
    "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "n_shared_experts": ("num_shared_expert",),
    "head_dim": ("head_dim", "attention_head_dim"),
}
NAMES = {
    **HF_NAMES,
    "q_norm": (BLOCK + ".self_attn.query_layernorm.weight",),
    "k_norm": (BLOCK + ".self_attn.key_layernorm.weight",),
    "router": (BLOCK + ".mlp.gate.wg.weight", *HF_NAMES["router"]),
}


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that may differ by layer must be uniform; `dynamic` with an `alpha` is a fixed base (NTK-aware)."""
    ours = {
        "num_experts": uniform(raw, "num_experts"),
        "num_experts_per_tok": uniform(raw, "num_experts_per_tok"),
        "moe_intermediate_size": uniform(raw, "moe_intermediate_size"),
        "n_shared_experts": uniform(raw, "n_shared_experts"),
    }
    rope = dict(rope_parameters(raw))
    if rope["rope_type"] == "dynamic" and rope.get("alpha"):
        whole = count(raw, "hidden_size") // count(raw, "num_attention_heads")
        dim = max(count(raw, "head_dim", default=whole), 4)  # smaller ones are refused
        base = number(rope, "rope_theta", 10_000.0) * number(rope, "alpha", 1.0) ** (dim / (dim - 2))
        rope = {"rope_type": "default", "rope_theta": base}
    return {**raw, **{name: value for name, value in ours.items() if value}, "rope_scaling": None,
            "rope_parameters": rope}  # fmt: skip


def uniform(raw: Mapping[str, Any], name: str) -> Any:
    """One value, or a list of equal values, one a layer."""
    value = raw.get(name)
    if not isinstance(value, list):
        return value
    if any(other != value[0] for other in value[1:]):
        own = OWN.get(name, (name,))[0]
        raise OffmoeError(f"hunyuan_v1_moe: {own} is {quote(value)}, and offmoe implements layers that are all alike")
    return value[0] if value else None


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    shared = count(raw, "n_shared_experts", default=1)
    inner = shared * count(raw, "moe_intermediate_size")
    hidden = count(raw, "shared_expert_intermediate_size", default=inner)
    return config.with_moe(shared=shared, shared_hidden=hidden)


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    return {"expert_shared_feed_forward_length": config.moe.shared_hidden}


DEFAULTS = {
    "vocab_size": 290943, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "num_experts": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 11008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}  # fmt: skip

FAMILY = Family(
    model_type="hunyuan_v1_moe",
    arch="hunyuan-moe",
    published="Hunyuan-A13B",
    qk_norm="after",
    renormalise=True,
    defaults=DEFAULTS,
    own=OWN,
    names=NAMES,
    translated=translated,
    gguf_keys=gguf_keys,
    configured=configured,
    implemented={
        "n_shared_experts": (),
        "shared_expert_intermediate_size": (),  # a GGUF says both
        "use_qk_norm": (True, None),
        "use_cla": (False, None),
        "moe_layer_num_skipped": (0, None),
        "norm_topk_prob": (True, None),
        "use_mla": (False, None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
    },
)
