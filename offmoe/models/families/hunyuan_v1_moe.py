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
NAMES = {
    **HF_NAMES,
    "q_norm": (BLOCK + ".self_attn.query_layernorm.weight",),
    "k_norm": (BLOCK + ".self_attn.key_layernorm.weight",),
    "router": (BLOCK + ".mlp.gate.wg.weight",),
    "shared_gate": (BLOCK + ".mlp.shared_mlp.gate_proj.weight",),
    "shared_up": (BLOCK + ".mlp.shared_mlp.up_proj.weight",),
    "shared_down": (BLOCK + ".mlp.shared_mlp.down_proj.weight",),
}


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that may differ by layer must be uniform; `dynamic` with an `alpha` is a fixed base (NTK-aware)."""
    ours = {
        "num_experts": uniform(raw, "num_experts"),
        "num_experts_per_tok": uniform(raw, "moe_topk", "num_experts_per_tok"),
        "moe_intermediate_size": uniform(raw, "moe_intermediate_size"),
        "n_shared_experts": uniform(raw, "num_shared_expert", "n_shared_experts"),
        "head_dim": raw.get("head_dim") or raw.get("attention_head_dim"),
    }
    rope = dict(rope_parameters(raw))
    if rope["rope_type"] == "dynamic" and rope.get("alpha"):
        whole = count(raw, "hidden_size") // count(raw, "num_attention_heads")
        dim = max(count(raw, "head_dim", "attention_head_dim", default=whole), 4)  # smaller ones are refused
        base = number(rope, "rope_theta", FAMILY.rope_theta) * number(rope, "alpha", 1.0) ** (dim / (dim - 2))
        rope = {"rope_type": "default", "rope_theta": base}
    return {**raw, **{name: value for name, value in ours.items() if value}, "rope_scaling": None,
            "rope_parameters": rope}  # fmt: skip


def uniform(raw: Mapping[str, Any], *names: str) -> Any:
    """The first of `names` that is there: one value, or a list of equal values, one a layer."""
    name = next((name for name in names if raw.get(name) is not None), names[0])
    value = raw.get(name)
    if not isinstance(value, list):
        return value
    if any(other != value[0] for other in value[1:]):
        raise OffmoeError(f"hunyuan_v1_moe: {name} is {quote(value)}, and offmoe implements layers that are all alike")
    return value[0] if value else None


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    shared = count(raw, "n_shared_experts", default=1)
    inner = count(raw, "moe_intermediate_size", "intermediate_size")
    hidden = count(raw, "shared_expert_intermediate_size", default=shared * inner)
    return config.with_moe(shared=shared, shared_hidden=hidden)


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    return {"expert_shared_feed_forward_length": config.moe.shared_hidden}


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    arch="hunyuan-moe",
    published="Hunyuan-A13B",
    qk_norm="after",
    renormalise=True,
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
