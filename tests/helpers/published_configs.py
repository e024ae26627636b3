"""config.json files of published checkpoints."""

from __future__ import annotations

from typing import Any

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
        "max_window_layers": 21, "max_position_embeddings": 8192},
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
