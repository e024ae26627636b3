"""OLMoE (1B-7B): q and k normed over all heads together, softmax router without renormalisation."""

from offmoe.models.family import Family

DEFAULTS = {
    "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": None, "head_dim": None, "num_experts": 64, "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "norm_topk_prob": False, "clip_qkv": None,
}  # fmt: skip

FAMILY = Family(
    model_type="olmoe",
    arch="olmoe",
    published="OLMoE-1B-7B",
    qk_norm="full",
    renormalise=False,
    defaults=DEFAULTS,
    own={"num_experts": ("num_experts", "num_local_experts"), "moe_intermediate_size": ("intermediate_size",)},
)
