"""Names of tensors by role, in safetensors and in a GGUF; mixers bring their own."""

from __future__ import annotations

from offmoe.mixers.base import Names
from offmoe.mixers.registry import gguf_names, hf_names

SHARED = "model.layers.{l}.mlp.shared_expert"  # or shared_experts

HF_NAMES: Names = {
    **hf_names(),
    "embed": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "attn_norm": ("model.layers.{l}.input_layernorm.weight",),
    "ffn_norm": ("model.layers.{l}.post_attention_layernorm.weight",),
    "router": ("model.layers.{l}.mlp.gate.weight",),
    "router_bias": ("model.layers.{l}.mlp.gate.e_score_correction_bias",),
    "gate": ("model.layers.{l}.mlp.experts.{e}.gate_proj.weight",),
    "up": ("model.layers.{l}.mlp.experts.{e}.up_proj.weight",),
    "down": ("model.layers.{l}.mlp.experts.{e}.down_proj.weight", "model.layers.{l}.mlp.experts.down_proj"),
    "gate_up": ("model.layers.{l}.mlp.experts.gate_up_proj",),
    "head_bias": ("lm_head.bias",),
    "attn_norm_bias": ("model.layers.{l}.input_layernorm.bias",),
    "ffn_norm_bias": ("model.layers.{l}.post_attention_layernorm.bias",),
    "final_norm_bias": ("model.norm.bias",),
    "dense_gate": ("model.layers.{l}.mlp.gate_proj.weight",),
    "dense_up": ("model.layers.{l}.mlp.up_proj.weight",),
    "dense_down": ("model.layers.{l}.mlp.down_proj.weight",),
    "shared_gate": (SHARED + ".gate_proj.weight", SHARED + "s.gate_proj.weight"),
    "shared_up": (SHARED + ".up_proj.weight", SHARED + "s.up_proj.weight"),
    "shared_down": (SHARED + ".down_proj.weight", SHARED + "s.down_proj.weight"),
    "shared_router": ("model.layers.{l}.mlp.shared_expert_gate.weight",),
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


def experts_apart(*bases: str) -> Names:
    """Names of the experts' matrices each by itself, as quantising tools write what the original stacks."""
    return {part: tuple(f"{base}.{{e}}.{part}_proj.weight" for base in bases) for part in ("gate", "up", "down")}


def with_vision(names: Names) -> Names:
    """Names that also fit the language model inside a model with vision."""
    return {
        role: tuple(form for name in own for form in (name, name.replace("model.", "model.language_model.", 1)))
        for role, own in names.items()
    }
