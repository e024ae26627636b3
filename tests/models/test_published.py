"""The config.json of published checkpoints gives the parameters that their makers state."""

from __future__ import annotations

from typing import Any

import pytest
from published_configs import LFM2_LAYERS, PUBLISHED

from offmoe.errors import OffmoeError
from offmoe.models.family import family_of
from offmoe.models.parameters import count_parameters
from offmoe.models.read_config import from_gguf, from_hf

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
        "expert_shared_feed_forward_length": 5632, "vocab_size": 151936, "context_length": 8192},
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
        "attention.layer_norm_rms_epsilon": 1e-5, "expert_used_count": 8, "expert_count": 128, "expert_shared_count": 1,
        "expert_feed_forward_length": 1408, "leading_dense_block_count": 1, "expert_gating_func": 2,
        "expert_weights_scale": 1.0, "expert_weights_norm": True, "vocab_size": 151552, "context_length": 131072},
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
    ({"linear_key_head_dim": None}, "gives linear_key_head_dim = null: expected a number like 128"),
    ({"layer_types": ["linear_attention"] * 48}, "layer_types has no full_attention: offmoe needs one"),
    ({"layer_types": ["full_attention"] * 47}, "expected 48 times linear_attention or full_attention"),
    ({"layer_types": ["full_attention", "sliding_attention"] * 24}, "layer_types is 'sliding_attention', and offmoe"),
    ({"layer_types": "linear_attention"}, "layer_types = 'linear_attention': expected a list"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and offmoe implements 'silu'"),
    ({"attention_bias": True}, "attention_bias is True, and offmoe implements False"),
    ({"attn_output_gate": False}, "attn_output_gate is False, and offmoe implements True"),
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
