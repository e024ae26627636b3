"""Names of tensors by role, in safetensors and in a GGUF; mixers bring their own."""

from __future__ import annotations

from collections.abc import Container

from offmoe.mixers.base import Names
from offmoe.mixers.registry import gguf_names, hf_names

BASE = "model."  # in front of every name of a language model in safetensors, but for its head's
PREFIXES = (  # what else stands there: inside a model with vision, in one saved without a head, around PEFT's
    BASE, "model.language_model.", "language_model.model.", "model.language_model.model.", "language_model.", "",
    "model.model.", "base_model.model.model.",
)  # fmt: skip
HEADS = ("", "language_model.", "model.", "model.language_model.", "base_model.model.")  # in front of a head's name
BLOCKS = ("mlp.", "block_sparse_moe.", "feed_forward.")  # what families call the part of a layer with experts
PARTS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}  # of a feed-forward part
SHARED = ("shared_expert.", "shared_experts.", "shared_mlp.")


def feed_forward(*blocks: str, router: str = "gate", numbered: bool = False) -> Names:
    """Names of a layer's feed-forward parts, with `blocks` or those of BLOCKS in front, the usual one first.

    Matrices have either of two names. Experts are apart, as their makers and tools that quantise write them, or
    stacked, as transformers 5 does. router: its usual name. numbered: w1, w3 and w2 are the usual names.
    """

    def each(*ends: str) -> tuple[str, ...]:
        return tuple(f"model.layers.{{l}}.{block}{end}" for block in dict.fromkeys(blocks + BLOCKS) for end in ends)

    def matrix(part: str, *bases: str) -> list[str]:
        return [f"{base}{name}.weight" for base in bases for name in PARTS[part][:: -1 if numbered else 1]]

    stacked = ("experts.down_proj", "experts.down_proj.weight", "experts.down_projs.{e}.weight")
    return {
        "router": each(f"{router}.weight", "gate.weight", "router.weight"),
        "router_bias": each("gate.e_score_correction_bias", "e_score_correction_bias"),
        "gate": each(*matrix("gate", "experts.{e}.")),
        "up": each(*matrix("up", "experts.{e}.")),
        "down": each(*matrix("down", "experts.{e}."), *stacked),
        "gate_up": each("experts.gate_up_proj", "experts.gate_up_proj.weight", "experts.{e}.gate_up_proj.weight",
                        "experts.gate_up_projs.{e}.weight"),
        **{f"dense_{part}": each(*matrix(part, "")) for part in PARTS},
        **{f"shared_{part}": each(*matrix(part, *SHARED)) for part in PARTS},
        "shared_router": each("shared_expert_gate.weight"),
    }  # fmt: skip


def under_prefix(names: Names, tensors: Container[str]) -> Names:
    """`names` of a language model, with what stands in front of them in a checkpoint that has these tensors."""
    found = [
        prefix for prefix in PREFIXES for norm in names["final_norm"] if prefix + norm.removeprefix(BASE) in tensors
    ]
    prefix = found[0] if found else BASE
    return {
        role: own if role.startswith("head") else tuple(prefix + name.removeprefix(BASE) for name in own)
        for role, own in names.items()
    }


HF_NAMES: Names = {
    **hf_names(),
    "embed": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    **feed_forward(),
    "head": tuple(f"{prefix}lm_head.weight" for prefix in HEADS),
    "attn_norm": ("model.layers.{l}.input_layernorm.weight",),
    "ffn_norm": ("model.layers.{l}.post_attention_layernorm.weight",),
    "head_bias": tuple(f"{prefix}lm_head.bias" for prefix in HEADS),
    "attn_norm_bias": ("model.layers.{l}.input_layernorm.bias",),
    "ffn_norm_bias": ("model.layers.{l}.post_attention_layernorm.bias",),
    "final_norm_bias": ("model.norm.bias",),
}

GGUF_NAMES: Names = {
    **gguf_names(),
    "embed": ("token_embd.weight",),
    "final_norm": ("output_norm.weight",),
    "head": ("output.weight",),
    "attn_norm": ("blk.{l}.attn_norm.weight",),
    "ffn_norm": ("blk.{l}.ffn_norm.weight",),
    "router": ("blk.{l}.ffn_gate_inp.weight",),
    "router_bias": ("blk.{l}.exp_probs_b.bias",),
    "gate": ("blk.{l}.ffn_gate_exps.weight", "blk.{l}.ffn_gate.{e}.weight"),
    "up": ("blk.{l}.ffn_up_exps.weight", "blk.{l}.ffn_up.{e}.weight"),
    "down": ("blk.{l}.ffn_down_exps.weight", "blk.{l}.ffn_down.{e}.weight"),
    "gate_up": ("blk.{l}.ffn_gate_up_exps.weight",),
    "head_bias": ("output.bias",),
    "attn_norm_bias": ("blk.{l}.attn_norm.bias",),
    "ffn_norm_bias": ("blk.{l}.ffn_norm.bias",),
    "final_norm_bias": ("output_norm.bias",),
    "router_offset": ("blk.{l}.ffn_gate_inp.bias",),
    "gate_bias": ("blk.{l}.ffn_gate_exps.bias",),
    "up_bias": ("blk.{l}.ffn_up_exps.bias",),
    "down_bias": ("blk.{l}.ffn_down_exps.bias",),
    "dense_gate": ("blk.{l}.ffn_gate.weight",),
    "dense_up": ("blk.{l}.ffn_up.weight",),
    "dense_down": ("blk.{l}.ffn_down.weight",),
    "shared_gate": ("blk.{l}.ffn_gate_shexp.weight",),
    "shared_up": ("blk.{l}.ffn_up_shexp.weight",),
    "shared_down": ("blk.{l}.ffn_down_shexp.weight",),
    "shared_router": ("blk.{l}.ffn_gate_inp_shexp.weight",),
    "attn_post_norm": ("blk.{l}.post_attention_norm.weight",),
    "shared_norm": ("blk.{l}.ffn_norm.weight",),
    "shared_post_norm": ("blk.{l}.post_ffw_norm_1.weight",),
    "routed_post_norm": ("blk.{l}.post_ffw_norm_2.weight",),
    "ffn_post_norm": ("blk.{l}.post_ffw_norm.weight",),
    "layer_scale": ("blk.{l}.layer_output_scale.weight",),
    "router_gain": ("blk.{l}.ffn_gate_inp.scale",),
    "router_factors": ("blk.{l}.ffn_down_exps.scale",),
}
