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
from offmoe.models.names import GGUF_NAMES, HF_NAMES, feed_forward
from offmoe.models.shared_fields import first_dense

CONV = "conv"  # a kind of layer
OWN = {
    "rms_norm_eps": ("norm_eps",),
    "first_k_dense_replace": ("num_dense_layers",),
    "tie_word_embeddings": ("tie_embedding", "tie_word_embeddings"),
}
LAYER = "model.layers.{l}"


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """In a GGUF, layers without key-value heads are convolutions."""
    heads = raw.get("num_key_value_heads")
    if isinstance(heads, list):
        if not all(type(n) is int for n in heads) or len({n for n in heads if n}) != 1:
            raise OffmoeError(f"attention.head_count_kv is {quote(heads)}: expected 0 or one other number a layer")
        return {**raw, "num_key_value_heads": max(heads), "layer_types": [FULL if n else CONV for n in heads]}
    return dict(raw)


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


DEFAULTS = {
    "vocab_size": 65536, "hidden_size": 2048, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": None, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 1792, "max_position_embeddings": 128000, "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0, "tie_word_embeddings": True, "intermediate_size": 7168, "first_k_dense_replace": 2,
    "layer_types": None, "conv_L_cache": 3, "use_expert_bias": True, "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}  # fmt: skip

FAMILY = Family(
    model_type="lfm2_moe",
    arch="lfm2moe",
    published="LFM2-8B-A1B",
    qk_norm="head",
    renormalise=True,
    defaults=DEFAULTS,
    own=OWN,
    names={
        **HF_NAMES,
        **feed_forward("feed_forward.", numbered=True),
        "final_norm": ("model.embedding_norm.weight",),
        "attn_norm": (LAYER + ".operator_norm.weight",),
        "ffn_norm": (LAYER + ".ffn_norm.weight",),
        "o": (LAYER + ".self_attn.out_proj.weight",),
        "q_norm": (LAYER + ".self_attn.q_layernorm.weight",),
        "k_norm": (LAYER + ".self_attn.k_layernorm.weight",),
        "router_bias": (LAYER + ".feed_forward.expert_bias",),
    },
    gguf_names={**GGUF_NAMES, "final_norm": ("token_embd_norm.weight", "output_norm.weight")},
    gguf_keys=gguf_keys,
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
