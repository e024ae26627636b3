"""LFM2-8B-A1B, 24B-A2B: most layers are gated short convolutions, the others attention with q and k normed per head;
first layers dense, sigmoid router with a correction bias (arXiv 2511.23404)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.checkpoint.fields import flag, number
from offmoe.errors import OffmoeError
from offmoe.kernels.route import Rule
from offmoe.mixers.recurrent import FULL, layers_of_kind
from offmoe.mixers.shortconv.config import ShortConvConfig
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import GGUF_NAMES, HF_NAMES
from offmoe.models.shared_fields import first_dense

CONV = "conv"  # a kind of layer
LAYER, BLOCK = "model.layers.{l}", "model.layers.{l}.feed_forward"


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """LFM2's field names → those of the other families; in a GGUF, layers without key-value heads are convolutions."""
    ours = {
        "rms_norm_eps": raw.get("norm_eps"),
        "first_k_dense_replace": raw.get("num_dense_layers"),
        "tie_word_embeddings": raw.get("tie_embedding", raw.get("tie_word_embeddings", True)),
    }
    heads = raw.get("num_key_value_heads")
    if isinstance(heads, list):
        if not all(type(n) is int for n in heads) or len({n for n in heads if n}) != 1:
            raise OffmoeError(f"attention.head_count_kv is {quote(heads)}: expected 0 or one other number a layer")
        ours |= {"num_key_value_heads": max(heads), "layer_types": [FULL if n else CONV for n in heads]}
    return {**raw, **{name: value for name, value in ours.items() if value is not None}}


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    mixer = ShortConvConfig.from_fields(raw)
    biased, scale = flag(raw, "use_expert_bias", True), number(raw, "routed_scaling_factor", 1.0)
    config = first_dense(raw, config)
    config = config.with_moe(rule=replace(config.moe.rule, scores="sigmoid", biased=biased, scale=scale))
    return config.with_mixers(dict.fromkeys(layers_of_kind(raw.get("layer_types"), config.layers, CONV), mixer))


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """Raises OffmoeError where llama.cpp would route otherwise."""
    if config.moe.rule != Rule(top_k=config.top_k, scores="sigmoid", biased=True, renormalise=True):
        raise OffmoeError(
            f"lfm2_moe with {config.moe.rule} cannot be packed: the GGUF architecture lfm2moe always means a biased "
            "sigmoid over all, renormalised"
        )
    kept = [0 if layer in config.recurrent else config.heads.kv_heads for layer in range(config.layers)]
    return {"attention.head_count_kv": kept}


FAMILY = Family(
    model_type="lfm2_moe",
    arch="lfm2moe",
    published="LFM2-8B-A1B",
    qk_norm="head",
    renormalise=True,
    names={
        **HF_NAMES,
        "final_norm": ("model.embedding_norm.weight",),
        "attn_norm": (LAYER + ".operator_norm.weight",),
        "ffn_norm": (LAYER + ".ffn_norm.weight",),
        "o": (LAYER + ".self_attn.out_proj.weight",),
        "q_norm": (LAYER + ".self_attn.q_layernorm.weight",),
        "k_norm": (LAYER + ".self_attn.k_layernorm.weight",),
        "router": (BLOCK + ".gate.weight",),
        "router_bias": (BLOCK + ".expert_bias",),
        "gate": (BLOCK + ".experts.{e}.w1.weight",),
        "up": (BLOCK + ".experts.{e}.w3.weight",),
        "down": (BLOCK + ".experts.{e}.w2.weight", BLOCK + ".experts.down_proj"),
        "gate_up": (BLOCK + ".experts.gate_up_proj",),
        "dense_gate": (BLOCK + ".w1.weight",),
        "dense_up": (BLOCK + ".w3.weight",),
        "dense_down": (BLOCK + ".w2.weight",),
    },
    gguf_names={**GGUF_NAMES, "final_norm": ("token_embd_norm.weight", "output_norm.weight")},
    gguf_keys=gguf_keys,
    rope_theta=1_000_000.0,
    translated=translated,
    configured=configured,
    implemented={
        "layer_types": (FULL, CONV),
        "conv_bias": (False, None),
        "expert_gating_func": (2,),
        "first_k_dense_replace": (),
        "routed_scaling_factor": (),
    },
)
