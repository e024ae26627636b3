"""What tells one model family from another; a family is one file beside this, named after its `model_type`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.rope import KINDS
from offmoe.kernels.route import Rule

if TYPE_CHECKING:
    from offmoe.models.config import ModelConfig

MODULES = (
    "qwen3_moe", "qwen2_moe", "glm4_moe", "mixtral", "olmoe", "gpt_oss",
    "deepseek_v3", "deepseek_v2", "kimi_k2", "glm4_moe_lite",
    "ernie4_5_moe", "dots1", "minimax_m2", "hunyuan_v1_moe", "granitemoe", "phimoe",
    "qwen3_next", "qwen3_5_moe", "lfm2_moe", "llama4", "gemma4",
)  # fmt: skip

Names = Mapping[str, tuple[str, ...]]  # role → templates over layer {l} and expert {e}; the first that exists counts

SHARED = "model.layers.{l}.mlp.shared_expert"  # or shared_experts
LINEAR = "model.layers.{l}.linear_attn"

HF_NAMES: Names = {
    "embed": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "attn_norm": ("model.layers.{l}.input_layernorm.weight",),
    "q": ("model.layers.{l}.self_attn.q_proj.weight",),
    "k": ("model.layers.{l}.self_attn.k_proj.weight",),
    "v": ("model.layers.{l}.self_attn.v_proj.weight",),
    "o": ("model.layers.{l}.self_attn.o_proj.weight",),
    "q_norm": ("model.layers.{l}.self_attn.q_norm.weight",),
    "k_norm": ("model.layers.{l}.self_attn.k_norm.weight",),
    "ffn_norm": ("model.layers.{l}.post_attention_layernorm.weight",),
    "router": ("model.layers.{l}.mlp.gate.weight",),
    "router_bias": ("model.layers.{l}.mlp.gate.e_score_correction_bias",),
    "gate": ("model.layers.{l}.mlp.experts.{e}.gate_proj.weight",),
    "up": ("model.layers.{l}.mlp.experts.{e}.up_proj.weight",),
    "down": ("model.layers.{l}.mlp.experts.{e}.down_proj.weight", "model.layers.{l}.mlp.experts.down_proj"),
    "gate_up": ("model.layers.{l}.mlp.experts.gate_up_proj",),
    "q_bias": ("model.layers.{l}.self_attn.q_proj.bias",),
    "k_bias": ("model.layers.{l}.self_attn.k_proj.bias",),
    "v_bias": ("model.layers.{l}.self_attn.v_proj.bias",),
    "q_a": ("model.layers.{l}.self_attn.q_a_proj.weight",),
    "q_a_norm": ("model.layers.{l}.self_attn.q_a_layernorm.weight",),
    "q_b": ("model.layers.{l}.self_attn.q_b_proj.weight",),
    "kv_a": ("model.layers.{l}.self_attn.kv_a_proj_with_mqa.weight",),
    "kv_a_norm": ("model.layers.{l}.self_attn.kv_a_layernorm.weight",),
    "kv_b": ("model.layers.{l}.self_attn.kv_b_proj.weight",),
    "o_bias": ("model.layers.{l}.self_attn.o_proj.bias",),
    "head_bias": ("lm_head.bias",),
    "attn_norm_bias": ("model.layers.{l}.input_layernorm.bias",),
    "ffn_norm_bias": ("model.layers.{l}.post_attention_layernorm.bias",),
    "final_norm_bias": ("model.norm.bias",),
    "sinks": ("model.layers.{l}.self_attn.sinks",),
    "dense_gate": ("model.layers.{l}.mlp.gate_proj.weight",),
    "dense_up": ("model.layers.{l}.mlp.up_proj.weight",),
    "dense_down": ("model.layers.{l}.mlp.down_proj.weight",),
    "shared_gate": (SHARED + ".gate_proj.weight", SHARED + "s.gate_proj.weight"),
    "shared_up": (SHARED + ".up_proj.weight", SHARED + "s.up_proj.weight"),
    "shared_down": (SHARED + ".down_proj.weight", SHARED + "s.down_proj.weight"),
    "shared_router": ("model.layers.{l}.mlp.shared_expert_gate.weight",),
    "delta_qkv": (LINEAR + ".in_proj_qkv.weight",),
    "delta_z": (LINEAR + ".in_proj_z.weight",),
    "delta_b": (LINEAR + ".in_proj_b.weight",),
    "delta_a": (LINEAR + ".in_proj_a.weight",),
    "delta_qkvz": (LINEAR + ".in_proj_qkvz.weight",),
    "delta_ba": (LINEAR + ".in_proj_ba.weight",),
    "delta_conv": (LINEAR + ".conv1d.weight",),
    "delta_dt": (LINEAR + ".dt_bias",),
    "delta_decay": (LINEAR + ".A_log",),
    "delta_norm": (LINEAR + ".norm.weight",),
    "delta_o": (LINEAR + ".out_proj.weight",),
}

GGUF_NAMES: Names = {
    "embed": ("token_embd.weight",),
    "final_norm": ("output_norm.weight",),
    "head": ("output.weight",),
    "attn_norm": ("blk.{l}.attn_norm.weight",),
    "q": ("blk.{l}.attn_q.weight",),
    "k": ("blk.{l}.attn_k.weight",),
    "v": ("blk.{l}.attn_v.weight",),
    "o": ("blk.{l}.attn_output.weight",),
    "q_norm": ("blk.{l}.attn_q_norm.weight",),
    "k_norm": ("blk.{l}.attn_k_norm.weight",),
    "ffn_norm": ("blk.{l}.ffn_norm.weight",),
    "router": ("blk.{l}.ffn_gate_inp.weight",),
    "router_bias": ("blk.{l}.exp_probs_b.bias",),
    "gate": ("blk.{l}.ffn_gate_exps.weight", "blk.{l}.ffn_gate.{e}.weight"),
    "up": ("blk.{l}.ffn_up_exps.weight", "blk.{l}.ffn_up.{e}.weight"),
    "down": ("blk.{l}.ffn_down_exps.weight", "blk.{l}.ffn_down.{e}.weight"),
    "gate_up": ("blk.{l}.ffn_gate_up_exps.weight",),
    "q_bias": ("blk.{l}.attn_q.bias",),
    "k_bias": ("blk.{l}.attn_k.bias",),
    "v_bias": ("blk.{l}.attn_v.bias",),
    "q_a": ("blk.{l}.attn_q_a.weight",),
    "q_a_norm": ("blk.{l}.attn_q_a_norm.weight",),
    "q_b": ("blk.{l}.attn_q_b.weight",),
    "kv_a": ("blk.{l}.attn_kv_a_mqa.weight",),
    "kv_a_norm": ("blk.{l}.attn_kv_a_norm.weight",),
    "kv_b": ("blk.{l}.attn_kv_b.weight",),  # of older files; later ones have its two halves, the keys' transposed
    "k_b": ("blk.{l}.attn_k_b.weight",),
    "v_b": ("blk.{l}.attn_v_b.weight",),
    "o_bias": ("blk.{l}.attn_output.bias",),
    "head_bias": ("output.bias",),
    "attn_norm_bias": ("blk.{l}.attn_norm.bias",),
    "ffn_norm_bias": ("blk.{l}.ffn_norm.bias",),
    "final_norm_bias": ("output_norm.bias",),
    "sinks": ("blk.{l}.attn_sinks.weight",),
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
    "delta_qkv": ("blk.{l}.attn_qkv.weight",),
    "delta_z": ("blk.{l}.attn_gate.weight",),
    "delta_b": ("blk.{l}.ssm_beta.weight",),
    "delta_a": ("blk.{l}.ssm_alpha.weight",),
    "delta_qkvz": ("blk.{l}.ssm_in.weight",),
    "delta_ba": ("blk.{l}.ssm_ba.weight",),
    "delta_conv": ("blk.{l}.ssm_conv1d.weight",),
    "delta_dt": ("blk.{l}.ssm_dt.bias",),
    "delta_decay": ("blk.{l}.ssm_a",),
    "delta_norm": ("blk.{l}.ssm_norm.weight",),
    "delta_o": ("blk.{l}.ssm_out.weight",),
    "conv_in": ("blk.{l}.shortconv.in_proj.weight",),
    "conv_taps": ("blk.{l}.shortconv.conv.weight",),
    "conv_o": ("blk.{l}.shortconv.out_proj.weight",),
}


def experts_apart(*bases: str) -> Names:
    """Of the experts' matrices each by itself: so do tools that quantise write them where they were stacked."""
    return {part: tuple(f"{base}.{{e}}.{part}_proj.weight" for base in bases) for part in ("gate", "up", "down")}


def with_vision(names: Names) -> Names:
    """Also of the language model inside one that sees."""
    return {
        role: tuple(form for name in own for form in (name, name.replace("model.", "model.language_model.", 1)))
        for role, own in names.items()
    }


Values = Callable[[Tensor], Tensor]
Fields = Callable[[Mapping[str, Any], int, Rule], dict[str, Any]]
Translated = Callable[[Mapping[str, Any]], dict[str, Any]]


def plain(raw: Mapping[str, Any], layers: int, rule: Rule) -> dict[str, Any]:
    """Experts in every layer, none shared."""
    return {}


GgufKeys = Callable[["ModelConfig"], dict[str, Any]]
GgufFields = Callable[[Callable[[str], Any]], dict[str, Any]]


def no_keys(config: ModelConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One architecture: its names on disk, its rules, and the config values that are implemented."""

    model_type: str
    arch: str  # of GGUF
    published: str  # a model that people run
    qk_norm: str
    renormalise: bool  # where the file does not say
    names: Names = field(default_factory=lambda: HF_NAMES)
    gguf_names: Names = field(default_factory=lambda: GGUF_NAMES)
    rope_theta: float = 10_000.0  # where the file does not say
    partial_rotary: float = 1.0  # share of a head that is rotated, where the file does not say
    interleaved: bool = False  # pairs that are rotated together lie side by side in q's and k's rows, in every file
    interleaved_gguf: bool = False  # llama.cpp permutes q and k rows of this arch
    values: Mapping[str, Values] = field(default_factory=dict)  # role → what its numbers in safetensors stand for
    tiled_gguf: bool = False  # llama.cpp orders the value heads of this arch so, see kernels.deltanet
    translated: Translated = dict  # a config of its own dialect in the field names that all share
    gguf_fields: GgufFields | None = None  # of config.json, out of a GGUF's keys that only this arch has
    gguf_keys: GgufKeys = no_keys  # that llama.cpp wants of this arch beside those of all
    gguf_factors: bool = False  # llama.cpp reads models.rope.GGUF_FACTORS of this arch
    dense_first: bool = True  # a GGUF of this arch says how many layers without experts come first, and has no others
    interleaved_experts: bool = False  # in safetensors: stacked gate and up take turns, row by row
    transposed_experts: bool = False  # in safetensors: stacked experts of floats lie column by column
    fields: Fields = plain  # fields of ModelConfig beyond what all families share, out of a config of so many layers
    implemented: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # the first value is the default; (): any

    def __post_init__(self) -> None:
        everywhere = {
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "rope_type": KINDS,
            "sliding_window": (None,),
            "layer_types": ("full_attention",),
            "scoring_func": ("softmax", None),
            "topk_method": ("greedy", None),
            "n_shared_experts": (0, None),
            "shared_expert_intermediate_size": (0, None),
            "first_k_dense_replace": (0, None),
            "routed_scaling_factor": (1.0, 0.0, None),
            "partial_rotary_factor": (1.0, None),
            "n_group": (1, 0, None),
            "kv_lora_rank": (None,),
            "expert_gating_func": (1, 0),
        }
        object.__setattr__(self, "implemented", {**everywhere, **self.implemented})


def families() -> list[Family]:
    return [importlib.import_module(f"offmoe.models.families.{name}").FAMILY for name in MODULES]


def family_of(key: str, value: object, gate: object = None) -> Family:
    """The family whose `key` (model_type or arch) is `value`.

    Where several share an arch, the first that implements `gate`, the file's expert_gating_func.
    """
    names = (value, str(value).removesuffix("_text"))  # a model that also sees, and its language model alone
    found = [family for family in families() if getattr(family, key) in names]
    if not found:
        known = ", ".join(dict.fromkeys(str(getattr(family, key)) for family in families()))
        raise OffmoeError(f"architecture {str(value)[:60]!r} is not supported; supported are {known}")
    return next((family for family in found if gate in family.implemented["expert_gating_func"]), found[0])
