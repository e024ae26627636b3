"""Tiny random models of every family, made with transformers: our oracle for logits and routing."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import mxfp4_files

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from reference import Reference, reference_of

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # as made by default, routing is nearly uniform and errors hide
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": 32, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "initializer_range": 0.1,  # with 0.2 transformers itself is 1.4e-4 off its own float64
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LATENT: dict[str, Any] = {"moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 2,
                          "num_key_value_heads": 4,
                          "intermediate_size": 96, "first_k_dense_replace": 1, "kv_lora_rank": 32,
                          "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 32,
                  "norm_topk_prob": True, "intermediate_size": 64},
    "qwen3_moe-sparse": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 32,
                         "intermediate_size": 96, "num_hidden_layers": 6, "mlp_only_layers": [3],
                         "decoder_sparse_step": 2, "norm_topk_prob": True},
    "qwen2_moe": {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64,
                  "shared_expert_intermediate_size": 64},
    "qwen2_moe-sparse": {"moe_intermediate_size": 32, "num_experts": 7, "num_experts_per_tok": 3,
                         "intermediate_size": 128, "shared_expert_intermediate_size": 96, "norm_topk_prob": True,
                         "mlp_only_layers": [1], "num_key_value_heads": 4, "use_sliding_window": False},
    "glm4_moe": {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 96,
                 "head_dim": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
                 "use_qk_norm": True, "attention_bias": True, "num_nextn_predict_layers": 0},
    "glm4_moe-groups": {"moe_intermediate_size": 32, "n_routed_experts": 12, "num_experts_per_tok": 4,
                        "intermediate_size": 64, "n_shared_experts": 2, "first_k_dense_replace": 2, "n_group": 4,
                        "topk_group": 2, "num_hidden_layers": 5, "partial_rotary_factor": 0.25, "head_dim": 32,
                        "num_nextn_predict_layers": 0},
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2, "q_lora_rank": 32, "topk_method": "greedy",
                    "routed_scaling_factor": 1.5},
    "deepseek_v2-lite": {**LATENT, "num_experts_per_tok": 2, "q_lora_rank": None, "topk_method": "greedy",
                         "rope_parameters": YARN},
    "deepseek_v2-groups": {**LATENT, "num_experts_per_tok": 3, "q_lora_rank": 32, "topk_method": "group_limited_greedy",
                           "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0, "rope_parameters": YARN},
    "deepseek_v3": {**LATENT, "num_experts_per_tok": 3, "q_lora_rank": 64, "n_group": 1, "topk_group": 1,
                    "n_shared_experts": 1, "rope_parameters": YARN},
    "deepseek_v3-groups": {**LATENT, "num_experts_per_tok": 4, "q_lora_rank": 64, "n_group": 4, "topk_group": 2,
                           "num_hidden_layers": 5, "first_k_dense_replace": 2, "kv_lora_rank": 64,
                           "qk_nope_head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 3,
                           "hidden_size": 96},
    "glm4_moe_lite": {**LATENT, "num_experts_per_tok": 2, "q_lora_rank": 32, "n_shared_experts": 1, "v_head_dim": 64,
                      "num_attention_heads": 5, "num_key_value_heads": 5, "routed_scaling_factor": 1.75,
                      "rms_norm_eps": 1e-5},
    "gpt_oss": {"intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 3, "num_hidden_layers": 4,
                "head_dim": 32, "sliding_window": 4, "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                    "rope_theta": 150_000.0, "truncate": False,
                                    "original_max_position_embeddings": 64}},
    "gpt_oss-clamped": {"intermediate_size": 64, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16,
                        "sliding_window": 3, "swiglu_limit": 1.0, "swiglu_alpha": 1.3,
                        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 2,
                "rope_theta": 50_000.0},
    "olmoe": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4, "num_key_value_heads": 4},
    "qwen3_next": {**LINEAR, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
                   "intermediate_size": 64},
    "qwen3_next-sparse": {**LINEAR, "num_experts": 6, "num_experts_per_tok": 2, "linear_num_key_heads": 3,
                          "linear_num_value_heads": 3, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 3,
                          "num_hidden_layers": 3, "mlp_only_layers": [1], "intermediate_size": 96,
                          "layer_types": ["full_attention", "linear_attention", "linear_attention"],
                          "partial_rotary_factor": 0.5},
    "qwen3_5_moe_text": {**LINEAR, "num_experts": 8, "num_experts_per_tok": 3, "linear_num_value_heads": 6},
    "ernie4_5_moe": {"moe_intermediate_size": 32, "moe_num_experts": 8, "moe_k": 3, "intermediate_size": 96,
                     "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "tie_word_embeddings": True},
    "dots1": {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 96,
              "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
              "num_key_value_heads": 4},
    "minimax_m2": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 32,
                   "rotary_dim": 16},
    "hunyuan_v1_moe": {"intermediate_size": 32, "num_experts": 8, "moe_topk": [3, 3, 3], "head_dim": 32,
                       "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0,
                                           "alpha": 1000.0}},
    "granitemoe": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 3,
                   "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.4,
                   "logits_scaling": 0.5, "rms_norm_eps": 0.05, "tie_word_embeddings": True},
    "phimoe": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "attention_bias": True,
               "lm_head_bias": True, "router_jitter_noise": 0.2, "rope_parameters": {
                   # Beyond `original` transformers 5.23 goes on with the short factors.
                   "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
                   "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "short_mscale": 1.2, "long_mscale": 1.2,
                   "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]}},
    "lfm2_moe": {"moe_intermediate_size": 32, "intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 3,
                 "num_dense_layers": 1, "num_hidden_layers": 4, "rope_theta": 1e6, "initializer_range": 0.1,
                 "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe-unbiased": {"moe_intermediate_size": 32, "intermediate_size": 64, "num_experts": 6,
                          "num_experts_per_tok": 2, "num_dense_layers": 2, "num_hidden_layers": 4, "conv_L_cache": 4,
                          "use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 1.5,
                          "layer_types": ["full_attention", "conv", "conv", "conv"], "tie_word_embeddings": False,
                          "initializer_range": 0.1},
    "llama4_text": {"intermediate_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 8, "head_dim": 32,
                    "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "rope_parameters": {
                        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "llama4_text-chunked": {"intermediate_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 6,
                            "num_hidden_layers": 4, "moe_layers": [0, 2, 3], "head_dim": 16, "attention_chunk_size": 7,
                            "no_rope_layer_interval": 3, "floor_scale": 5, "attn_scale": 0.5, "rope_parameters": {
                                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 1.0, "original_max_position_embeddings": 32}},
    "gemma4_text": {"moe_intermediate_size": 32, "intermediate_size": 96, "num_experts": 8, "top_k_experts": 3,
                    "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
                    "attention_k_eq_v": True, "sliding_window": 6, "enable_moe_block": True,
                    "hidden_size_per_layer_input": 0, "final_logit_softcapping": 3.0, "initializer_range": 0.1,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "olmoe-clipped": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4, "clip_qkv": 1.0},
}  # fmt: skip
# One family or more for every mixer, kind of router and layout of a layer: what the default run of slow tests takes.
TELLING = (
    "qwen3_moe",
    "qwen2_moe-sparse",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    "lfm2_moe",
    "gemma4_text",
    "llama4_text",
)

# What llama.cpp's archs have no key for: clip_qkv, layers without experts, a sparse mixer.
PACKABLE = [*(f for f in FAMILIES if "-" not in f and f != "phimoe"), "deepseek_v3-groups", "glm4_moe-groups"]
# llama.cpp knows by its 27 layers that such a model's queries have no latent.
PACKABLE_UNHEARD = [*PACKABLE, "deepseek_v2-lite"]


@cache
def tiny(family: str) -> Any:
    """The model in float32, the same every time."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family.partition("-")[0], **{**SHAPE, **FAMILIES[family]})
    torch.manual_seed(len(family))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones hide a norm that is left out
            torch.nn.init.normal_(parameter, float(parameter.data.mean()), 0.2)  # some count from 1
        if "bias" in name or "sinks" in name:  # as do zeros a bias
            torch.nn.init.normal_(parameter, 0.0, 0.5)
        if name.endswith(("router.scale", "per_expert_scale")):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.8)
        if "correction_bias" in name or "expert_bias" in name:
            torch.nn.init.normal_(buffer, 0.0, 0.2)
    if family.startswith("gpt_oss"):
        mxfp4_files.round_experts(model)
    return model


def saved(family: str, folder: Path, fused: bool = False, **save: Any) -> Path:
    """Written as a Hugging Face directory: names per expert, or the fused ones."""
    path = folder / f"{family}-{'fused' if fused else 'split'}"
    tiny(family).save_pretrained(path, save_original_format=not fused, **save)
    if family.startswith("gpt_oss") and not fused:
        mxfp4_files.quantise_experts(path)
    return path


def reference(family: str, ids: list[int]) -> Reference:
    """Return logits and routing of the tiny model in float64, computed once."""
    return _reference(family, tuple(ids))


@cache
def _reference(family: str, ids: tuple[int, ...]) -> Reference:
    return reference_of(tiny(family), list(ids))
