"""The config.json of published checkpoints gives the parameters that their makers state."""

from __future__ import annotations

from typing import Any

import pytest

from offmoe.errors import OffmoeError
from offmoe.models.family import family_of
from offmoe.models.parameters import count_parameters
from offmoe.models.read_config import from_gguf, from_hf

QWEN = {"hidden_act": "silu", "tie_word_embeddings": False, "vocab_size": 151936, "rms_norm_eps": 1e-6}
QWEN_LINEAR = {
    "hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_size": 2048,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "full_attention_interval": 4}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4, "experts_per_token": 4,
    "vocab_size": 201088, "max_position_embeddings": 131072, "initial_context_length": 4096, "attention_bias": True,
    "rms_norm_eps": 1e-05, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                     "rope_type": "yarn", "truncate": False},
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "vocab_size": 129280, "hidden_act": "silu",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000, "attention_bias": False,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "tie_word_embeddings": False}  # fmt: skip
LATER_YARN = {**DEEPSEEK["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707}  # type: ignore[dict-item]
DEEPSEEK_V2 = {**DEEPSEEK, "model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False,
               "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 102400,
               "rope_scaling": LATER_YARN}  # fmt: skip
LFM2_LAYERS = ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)]
LLAMA4 = {
    "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "num_experts_per_tok": 1, "vocab_size": 202048, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "attention_chunk_size": 8192, "attention_bias": False, "attn_temperature_tuning": True, "floor_scale": 8192,
    "attn_scale": 0.1, "tie_word_embeddings": False, "router_jitter_noise": 0.0, "moe_layers": None,
    "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(48)]}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "Gemma-4-26B-A4B": {"model_type": "gemma4", "text_config": {
        "model_type": "gemma4_text", "hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704,
        "num_hidden_layers": 30, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "global_head_dim": 512, "num_global_key_value_heads": 2, "attention_k_eq_v": True, "num_experts": 128,
        "top_k_experts": 8, "enable_moe_block": True, "vocab_size": 262144, "sliding_window": 1024,
        "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 262144, "rms_norm_eps": 1e-6,
        "use_bidirectional_attention": "vision", "layer_types": [
            "sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(30)],
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}}}},
    "Llama-4-Scout-17B-16E": {"model_type": "llama4", "image_token_index": 200092, "text_config": {
        **LLAMA4, "model_type": "llama4_text", "num_local_experts": 16, "interleave_moe_layer_step": 1,
        "use_qk_norm": True, "max_position_embeddings": 10485760, "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192}}},
    "Llama-4-Maverick-17B-128E": {"model_type": "llama4", "text_config": {
        **LLAMA4, "model_type": "llama4_text", "num_local_experts": 128, "interleave_moe_layer_step": 2,
        "use_qk_norm": False, "max_position_embeddings": 1048576, "rope_scaling": None}},
    "LFM2-8B-A1B": {
        "model_type": "lfm2_moe", "hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792,
        "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 8, "num_experts": 32,
        "num_experts_per_tok": 4, "num_dense_layers": 2, "norm_topk_prob": True, "use_expert_bias": True,
        "routed_scaling_factor": 1.0, "conv_L_cache": 3, "conv_bias": False, "layer_types": LFM2_LAYERS,
        "norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": 65536, "max_position_embeddings": 128000,
        "tie_embedding": True},
    "DeepSeek-V3": DEEPSEEK,
    "DeepSeek-V2": {
        **DEEPSEEK_V2, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 60, "n_routed_experts": 160, "n_group": 8, "topk_group": 3,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    "DeepSeek-V2-Lite": {
        **DEEPSEEK_V2, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64,
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0},
    "Kimi-K2-Instruct-0905": {
        **DEEPSEEK, "model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.827, "vocab_size": 163840, "max_position_embeddings": 262144, "rope_theta": 50000.0,
        "rope_scaling": {**DEEPSEEK["rope_scaling"], "factor": 64.0, "beta_fast": 1.0}},  # type: ignore[dict-item]
    "GLM-4.7-Flash": {
        "model_type": "glm4_moe_lite", "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
        "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "n_routed_experts": 64,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "kv_lora_rank": 512,
        "q_lora_rank": 768, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256, "n_group": 1,
        "topk_group": 1, "topk_method": "noaux_tc", "routed_scaling_factor": 1.8, "norm_topk_prob": True,
        "num_nextn_predict_layers": 1, "vocab_size": 154880, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 202752, "rope_theta": 1000000, "rope_scaling": None, "partial_rotary_factor": 1.0,
        "attention_bias": False, "tie_word_embeddings": False},
    "Qwen3-Next-80B-A3B": {
        **QWEN_LINEAR, "model_type": "qwen3_next", "vocab_size": 151936, "intermediate_size": 5120,
        "num_hidden_layers": 48, "num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "partial_rotary_factor": 0.25, "rope_theta": 10000000,
        "rope_scaling": None, "use_sliding_window": False},
    "Qwen3.6-35B-A3B": {
        "model_type": "qwen3_5_moe", "tie_word_embeddings": False, "image_token_id": 248056,
        "vision_config": {"model_type": "qwen3_5_moe", "depth": 27, "hidden_size": 1152},
        "text_config": {
            **QWEN_LINEAR, "model_type": "qwen3_5_moe_text", "vocab_size": 248320, "num_hidden_layers": 40,
            "num_experts": 256, "num_experts_per_tok": 8, "attn_output_gate": True, "mtp_num_hidden_layers": 1,
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
                                "mrope_interleaved": True, "mrope_section": [11, 11, 10]}}},
    "gpt-oss-20b": {**GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32,
                    "layer_types": ["sliding_attention", "full_attention"] * 12},
    "gpt-oss-120b": {**GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128,
                     "layer_types": ["sliding_attention", "full_attention"] * 18},
    "Mixtral-8x7B-v0.1": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None,
        "hidden_act": "silu", "tie_word_embeddings": False},
    "OLMoE-1B-7B-0924": {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 50304, "norm_topk_prob": False, "clip_qkv": None, "attention_bias": False,
        "tie_word_embeddings": False},
    "Qwen3-30B-A3B": {
        **QWEN, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "sliding_window": None, "use_sliding_window": False},
    "Qwen1.5-MoE-A2.7B": {
        **QWEN, "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "decoder_sparse_step": 1, "norm_topk_prob": False, "sliding_window": 32768, "use_sliding_window": False,
        "max_window_layers": 21},
    "Qwen2-57B-A14B": {
        **QWEN, "model_type": "qwen2_moe", "hidden_size": 3584, "intermediate_size": 18944,
        "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 8,
        "decoder_sparse_step": 1, "norm_topk_prob": False, "sliding_window": 65536, "use_sliding_window": False,
        "max_window_layers": 28},
    "GLM-4.5-Air": {
        "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "use_qk_norm": False,
        "attention_bias": True, "partial_rotary_factor": 0.5, "rope_theta": 1000000, "rope_scaling": None,
        "num_nextn_predict_layers": 1, "vocab_size": 151552, "hidden_act": "silu", "tie_word_embeddings": False},
    "GLM-4.5": {
        "model_type": "glm4_moe", "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "use_qk_norm": True,
        "attention_bias": True, "partial_rotary_factor": 0.5, "rope_theta": 1000000, "rope_scaling": None,
        "num_nextn_predict_layers": 1, "vocab_size": 151552, "hidden_act": "silu", "tie_word_embeddings": False},
    "ERNIE-4.5-21B-A3B": {
        "model_type": "ernie4_5_moe", "hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "moe_num_experts": 64,
        "moe_k": 6, "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 27,
        "moe_layer_interval": 1, "use_bias": False, "rope_theta": 500000.0, "vocab_size": 103424,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True},
    "dots.llm1": {
        "model_type": "dots1", "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 32, "n_routed_experts": 128,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc", "vocab_size": 152064,
        "max_position_embeddings": 32768, "rope_theta": 10000000, "sliding_window": None, "max_window_layers": 62,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False},
    "MiniMax-M2": {
        "quantization_config": {"quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic",
                                "weight_block_size": [128, 128]},
        "model_type": "minimax_m2", "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
        "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 256,
        "num_experts_per_tok": 8, "rotary_dim": 64, "rope_theta": 5000000, "scoring_func": "sigmoid",
        "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True, "shared_intermediate_size": 0,
        "attn_type_list": [1] * 62, "vocab_size": 200064, "max_position_embeddings": 196608, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": False},
    "Hunyuan-A13B": {
        "model_type": "hunyuan_v1_moe", "hidden_size": 4096, "intermediate_size": 3072,
        "moe_intermediate_size": [3072] * 32, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "attention_head_dim": 128, "num_experts": 64, "moe_topk": [8] * 32,
        "num_shared_expert": [1] * 32, "moe_layer_num_skipped": 0, "use_qk_norm": True, "use_cla": False,
        "norm_topk_prob": True, "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1,
                         "mscale": 1.0, "mscale_all_dim": 1.0},
        "vocab_size": 128167, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True},
    "Granite-3.1-3B-A800M": {
        "model_type": "granitemoe", "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8,
        "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22,
        "logits_scaling": 6.0, "rope_theta": 1500000, "rope_scaling": None, "vocab_size": 49155,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
        "tie_word_embeddings": True},
    "Phi-3.5-MoE": {
        "model_type": "phimoe", "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01, "input_jitter_noise": 0.01, "attention_bias": True, "lm_head_bias": True,
        "rope_theta": 10000.0, "sliding_window": 131072, "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096, "short_factor": [1.0] * 64,
                         "long_factor": [1.0] * 64, "short_mscale": 1.243163121016122,
                         "long_mscale": 1.243163121016122},  # the factors are longer numbers
        "vocab_size": 32064, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False},
}  # fmt: skip

# Total and active in billions, and what the makers count as active: every matrix that a token needs ("all"),
# "no embedding" of the input, or no output head either ("neither").
STATED = {
    "gpt-oss-20b": (20.91, 3.61, "no embedding"),
    "gpt-oss-120b": (116.83, 5.13, "no embedding"),
    "Mixtral-8x7B-v0.1": (46.7, 12.9, "all"),
    "OLMoE-1B-7B-0924": (6.9, 1.3, "all"),
    "Qwen3-30B-A3B": (30.5, 3.3, "all"),
    "Qwen1.5-MoE-A2.7B": (14.3, 2.7, "all"),
    "Qwen2-57B-A14B": (57.4, 14.0, "all"),
    "Qwen3-Next-80B-A3B": (80.0, 3, "neither"),
    "Qwen3.6-35B-A3B": (35.0, 3.0, "no embedding"),
    "GLM-4.5-Air": (106.0, 12.0, "neither"),
    "GLM-4.5": (355.0, 32.0, "neither"),
    "dots.llm1": (142.0, 14.0, "all"),
    "MiniMax-M2": (230.0, 10.0, "neither"),
    "Hunyuan-A13B": (80.0, 13.0, "all"),
    "Phi-3.5-MoE": (41.9, 6.6, "all"),
    "Granite-3.1-3B-A800M": (3.3, 0.8, "neither"),
    "Gemma-4-26B-A4B": (25.2, 3.8, "all"),
    "LFM2-8B-A1B": (8.3, 1.5, "all"),
    "Llama-4-Scout-17B-16E": (109.0, 17, "all"),
    "Llama-4-Maverick-17B-128E": (400.0, 17, "all"),
    "DeepSeek-V3": (671.0, 37.0, "no embedding"),
    "DeepSeek-V2": (236.0, 21.0, "no embedding"),
    "DeepSeek-V2-Lite": (15.7, 2.4, "no embedding"),
    "Kimi-K2-Instruct-0905": (1040.0, 32.0, "no embedding"),  # 1.04 trillion in arXiv 2507.20534
    "GLM-4.7-Flash": (30.0, 3.0, "neither"),
}
CUT = {"DeepSeek-V2-Lite": 0.06, "LFM2-8B-A1B": 0.06, "GLM-4.7-Flash": 0.5}  # active figures cut: 2.45 as 2.4; A3B
# Makers who left the rest of their figures out: total and active of all, and the decimals that they give.
FLOORED = {"ERNIE-4.5-21B-A3B": (21.0, 3.0, 0)}


@pytest.mark.parametrize("name", FLOORED)
def test_the_parameters_cut_are_those_published(name: str) -> None:
    raw, (total, active, decimals) = PUBLISHED[name], FLOORED[name]
    ours, everything, _ = count_parameters(from_hf(raw, family_of("model_type", raw["model_type"])))
    assert [int(found * 10**decimals / 1e9) / 10**decimals for found in (ours, everything)] == [total, active]


@pytest.mark.parametrize("name", STATED)
def test_the_parameters_are_those_published(name: str) -> None:
    raw, (total, active, convention) = PUBLISHED[name], STATED[name]
    config = from_hf(raw, family_of("model_type", raw["model_type"]))
    ours, everything, without_embedding = count_parameters(config)
    found = {"all": everything, "no embedding": without_embedding,
             "neither": without_embedding - config.vocab * config.hidden}[convention]  # fmt: skip
    assert ours / 1e9 == pytest.approx(total, rel=0.02)
    if isinstance(active, int):  # rounded to whole billions by its maker
        found = round(found / 1e9) * 10**9
    assert found / 1e9 == pytest.approx(active, rel=0.02, abs=CUT.get(name))


GGUF_LINEAR: dict[str, Any] = {
    "context_length": 262144, "embedding_length": 2048, "attention.head_count": 16, "attention.head_count_kv": 2,
    "attention.key_length": 256, "attention.value_length": 256, "rope.freq_base": 1e7, "rope.dimension_count": 64,
    "attention.layer_norm_rms_epsilon": 1e-6, "expert_feed_forward_length": 512,
    "expert_shared_feed_forward_length": 512, "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16,
    "ssm.time_step_rank": 32, "ssm.inner_size": 4096, "full_attention_interval": 4}  # fmt: skip
# What llama.cpp's converter writes of some of them, and the tensors that a config is read from.
CONVERTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gpt-oss-20b": ({
        "block_count": 24, "embedding_length": 2880, "feed_forward_length": 2880, "attention.head_count": 64,
        "attention.head_count_kv": 8, "attention.key_length": 64, "attention.value_length": 64,
        "rope.freq_base": 150000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 128, "expert_used_count": 4, "expert_count": 32,
        "expert_feed_forward_length": 2880, "vocab_size": 201088, "context_length": 131072},
        ("output.weight", "blk.0.attn_q.bias")),
    "Qwen1.5-MoE-A2.7B": ({
        "block_count": 24, "embedding_length": 2048, "feed_forward_length": 5632, "attention.head_count": 16,
        "attention.head_count_kv": 16, "rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_used_count": 4, "expert_count": 60, "expert_feed_forward_length": 1408,
        "expert_shared_feed_forward_length": 5632, "vocab_size": 151936, "context_length": 4096},
        ("output.weight", "blk.0.attn_q.bias")),
    "Qwen3-Next-80B-A3B": ({
        **GGUF_LINEAR, "block_count": 48, "feed_forward_length": 5120, "expert_used_count": 10, "expert_count": 512,
        "vocab_size": 151936}, ("output.weight",)),
    "Qwen3.6-35B-A3B": ({
        **GGUF_LINEAR, "block_count": 41, "nextn_predict_layers": 1, "expert_used_count": 8, "expert_count": 256,
        "vocab_size": 248320, "rope.dimension_sections": [11, 11, 10, 0]}, ("output.weight",)),
    "Llama-4-Maverick-17B-128E": ({
        "block_count": 48, "embedding_length": 5120, "feed_forward_length": 16384, "attention.head_count": 40,
        "attention.head_count_kv": 8, "attention.key_length": 128, "attention.value_length": 128,
        "rope.freq_base": 500000.0, "rope.dimension_count": 128, "attention.layer_norm_rms_epsilon": 1e-5,
        "expert_used_count": 1, "expert_count": 128, "expert_feed_forward_length": 8192,
        "interleave_moe_layer_step": 2, "vocab_size": 202048, "context_length": 1048576}, ("output.weight",)),
    "LFM2-8B-A1B": ({
        "block_count": 24, "embedding_length": 2048, "feed_forward_length": 7168, "attention.head_count": 32,
        "attention.head_count_kv": [8 if kind == "full_attention" else 0 for kind in LFM2_LAYERS],
        "rope.freq_base": 1e6, "attention.layer_norm_rms_epsilon": 1e-5, "expert_used_count": 4, "expert_count": 32,
        "expert_feed_forward_length": 1792, "leading_dense_block_count": 2, "expert_gating_func": 2,
        "shortconv.l_cache": 3, "vocab_size": 65536, "context_length": 128000}, ()),
    "GLM-4.5-Air": ({
        "block_count": 47, "nextn_predict_layers": 1, "embedding_length": 4096, "feed_forward_length": 10944,
        "attention.head_count": 96, "attention.head_count_kv": 8, "attention.key_length": 128,
        "attention.value_length": 128, "rope.freq_base": 1e6, "rope.dimension_count": 64,
        "attention.layer_norm_rms_epsilon": 1e-6, "expert_used_count": 8, "expert_count": 128, "expert_shared_count": 1,
        "expert_feed_forward_length": 1408, "leading_dense_block_count": 1, "expert_gating_func": 2,
        "expert_weights_scale": 1.0, "expert_weights_norm": True, "vocab_size": 151552, "context_length": 4096},
        ("output.weight", "blk.0.attn_q.bias")),
    "DeepSeek-V2-Lite": ({
        "block_count": 27, "embedding_length": 2048, "feed_forward_length": 10944, "attention.head_count": 16,
        "attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512,
        "attention.key_length_mla": 192, "attention.value_length_mla": 128, "attention.kv_lora_rank": 512,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0, "rope.dimension_count": 64,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": 0.0707, "expert_used_count": 6, "expert_count": 64,
        "expert_shared_count": 2, "expert_feed_forward_length": 1408, "leading_dense_block_count": 1,
        "expert_weights_scale": 1.0, "vocab_size": 102400, "context_length": 163840}, ("output.weight",)),
    "GLM-4.7-Flash": ({
        "block_count": 47, "embedding_length": 2048, "feed_forward_length": 10240, "attention.head_count": 20,
        "attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512,
        "attention.key_length_mla": 256, "attention.value_length_mla": 256, "attention.kv_lora_rank": 512,
        "attention.q_lora_rank": 768, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6,
        "rope.dimension_count": 64, "expert_used_count": 4, "expert_count": 64, "expert_shared_count": 1,
        "expert_group_count": 1, "expert_group_used_count": 1, "expert_feed_forward_length": 1536,
        "leading_dense_block_count": 1, "expert_gating_func": 2, "expert_weights_scale": 1.8,
        "expert_weights_norm": True, "vocab_size": 154880, "context_length": 202752}, ("output.weight",)),
    "ERNIE-4.5-21B-A3B": ({
        "block_count": 28, "embedding_length": 2560, "feed_forward_length": 12288, "attention.head_count": 20,
        "attention.head_count_kv": 4, "rope.freq_base": 500000.0, "attention.layer_norm_rms_epsilon": 1e-5,
        "expert_used_count": 6, "expert_count": 64, "expert_shared_count": 2, "expert_feed_forward_length": 1536,
        "expert_shared_feed_forward_length": 3072, "interleave_moe_layer_step": 1, "leading_dense_block_count": 1,
        "vocab_size": 103424, "context_length": 131072}, ()),
    "MiniMax-M2": ({
        "block_count": 62, "embedding_length": 3072, "feed_forward_length": 1536, "attention.head_count": 48,
        "attention.head_count_kv": 8, "attention.key_length": 128, "attention.value_length": 128,
        "rope.dimension_count": 64, "rope.freq_base": 5e6, "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_used_count": 8, "expert_count": 256, "expert_feed_forward_length": 1536, "expert_gating_func": 2,
        "vocab_size": 200064, "context_length": 196608}, ("output.weight", "blk.0.attn_q_norm.weight")),
    "Hunyuan-A13B": ({
        "block_count": 32, "embedding_length": 4096, "feed_forward_length": 3072, "attention.head_count": 32,
        "attention.head_count_kv": 8, "attention.key_length": 128, "attention.value_length": 128,
        "rope.freq_base": 10000 * 1000 ** (128 / 126), "rope.scaling.type": "none",
        "attention.layer_norm_rms_epsilon": 1e-5, "expert_used_count": 8, "expert_count": 64, "expert_shared_count": 1,
        "expert_feed_forward_length": 3072, "expert_shared_feed_forward_length": 3072, "vocab_size": 128167,
        "context_length": 32768}, ("blk.0.attn_q_norm.weight",)),
    "Granite-3.1-3B-A800M": ({
        "block_count": 32, "embedding_length": 1536, "feed_forward_length": 512, "attention.head_count": 24,
        "attention.head_count_kv": 8, "rope.freq_base": 1.5e6, "rope.dimension_count": 64,
        "attention.layer_norm_rms_epsilon": 1e-6, "expert_used_count": 8, "expert_count": 40, "embedding_scale": 12.0,
        "attention.scale": 0.015625, "residual_scale": 0.22, "logit_scale": 6.0, "vocab_size": 49155,
        "context_length": 131072}, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_a_gguf_says_what_the_config_says(name: str) -> None:
    (keys, tensors), raw = CONVERTED[name], PUBLISHED[name]
    family = family_of("model_type", raw["model_type"])
    metadata = {f"{family.arch}.{key}": value for key, value in keys.items()}
    assert from_gguf(metadata, family, dict.fromkeys(tensors)) == from_hf(raw, family)


@pytest.mark.parametrize(("change", "message"), [
    ({"linear_num_value_heads": 24}, "linear_num_value_heads is 24: expected a multiple of 16 key heads"),
    ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1: expected at least 2"),
    ({"linear_key_head_dim": None}, "has no linear_key_head_dim: it is incomplete"),
    ({"layer_types": ["linear_attention"] * 48}, "layer_types has no full_attention: offmoe needs one"),
    ({"layer_types": ["full_attention"] * 47}, "expected 48 times linear_attention or full_attention"),
    ({"layer_types": ["full_attention", "sliding_attention"] * 24}, "layer_types is 'sliding_attention', and offmoe"),
    ({"layer_types": "linear_attention"}, "layer_types = 'linear_attention': expected a list"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and offmoe implements 'silu'"),
    ({"attention_bias": True}, "attention_bias is True, and offmoe implements False"),
    ({"attn_output_gate": False}, "attn_output_gate is False, and offmoe implements True"),
    ({"use_sliding_window": True}, "use_sliding_window is True, and offmoe implements False"),
])  # fmt: skip
def test_a_deltanet_that_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OffmoeError, match=message):
        from_hf({**PUBLISHED["Qwen3-Next-80B-A3B"], **change}, family_of("model_type", "qwen3_next"))


@pytest.mark.parametrize(("change", "message"), [
    ({"num_experts_per_tok": 2}, "llama4: num_experts_per_tok is 2, and offmoe implements 1"),
    ({"no_rope_layers": [1, 1, 2, 0] * 12}, "no_rope_layers is .*: expected 0 or 1 for each of 48 layers"),
    ({"layer_types": ["full_attention"] * 47}, "expected 'full_attention' or 'chunked_attention' for each of 48"),
    ({"layer_types": ["sliding_attention"] * 48}, "layer_types is 'sliding_attention', and offmoe implements"),
    ({"attention_chunk_size": 0}, "attention_chunk_size = 0: expected a whole number of at least 1"),
    ({"moe_layers": [0, 48]}, "moe_layers is .*: expected layers of 0 to 47"),
    ({"interleave_moe_layer_step": 49}, "none of the 48 layers has experts"),
    ({"attention_bias": True}, "attention_bias is True, and offmoe implements False"),
    ({"attn_temperature_tuning": 4}, "attn_temperature_tuning = 4: expected true or false"),
    ({"floor_scale": 0.5}, "floor_scale = 0.5: expected a whole number"),
])  # fmt: skip
def test_a_llama4_that_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    raw = PUBLISHED["Llama-4-Scout-17B-16E"]
    with pytest.raises(OffmoeError, match=message):
        from_hf({**raw, "text_config": {**raw["text_config"], **change}}, family_of("model_type", "llama4"))


@pytest.mark.parametrize(("change", "message"), [
    ({"conv_bias": True}, "lfm2_moe: conv_bias is True, and offmoe implements False"),
    ({"conv_L_cache": 1}, "conv_L_cache is 1: expected at least 2"),
    ({"layer_types": None}, "layer_types is None: expected 24 times conv or full_attention"),
    ({"layer_types": ["conv", "mamba"] * 12}, "lfm2_moe: layer_types is 'mamba', and offmoe implements"),
    ({"layer_types": ["conv"] * 24}, "layer_types has no full_attention: offmoe needs one"),
    ({"num_key_value_heads": [0, 8, 4] * 8}, "head_count_kv is .*: expected 0 or one other number a layer"),
    ({"use_expert_bias": 1}, "use_expert_bias = 1: expected true or false"),
])  # fmt: skip
def test_convolutions_that_are_not_implemented_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OffmoeError, match=message):
        from_hf({**PUBLISHED["LFM2-8B-A1B"], **change}, family_of("model_type", "lfm2_moe"))


def test_a_text_config_that_is_no_table_is_refused() -> None:
    with pytest.raises(OffmoeError, match="text_config in the model's config is no table"):
        from_hf({**PUBLISHED["Qwen3.6-35B-A3B"], "text_config": 3}, family_of("model_type", "qwen3_5_moe"))


GEMMA = [
    ({"hidden_activation": "silu"}, "gemma4: hidden_activation is 'silu', and offmoe implements 'gelu_pytorch_tanh'"),
    ({"hidden_size_per_layer_input": 256}, "gemma4: hidden_size_per_layer_input is 256, and offmoe implements 0"),
    ({"num_kv_shared_layers": 20}, "gemma4: num_kv_shared_layers is 20, and offmoe implements 0"),
    ({"enable_moe_block": False}, "gemma4: enable_moe_block is False, and offmoe implements True"),
    ({"use_bidirectional_attention": "all"}, "gemma4: use_bidirectional_attention is 'all'"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "gemma4: rope_parameters is .*: expected a table for sliding_attention"),
    ({"global_head_dim": 511}, "head_dim is 511: rotary embedding needs an even number above 0"),
    ({"num_global_key_value_heads": 3}, "16 heads do not divide among 3 key-value heads"),
]


@pytest.mark.parametrize(("change", "message"), GEMMA)
def test_gemmas_that_are_not_implemented_are_refused(change: dict[str, Any], message: str) -> None:
    raw = PUBLISHED["Gemma-4-26B-A4B"]
    with pytest.raises(OffmoeError, match=message):
        from_hf({**raw, "text_config": {**raw["text_config"], **change}}, family_of("model_type", "gemma4"))
