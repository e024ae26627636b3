"""Mixtral (8x7B, 8x22B) and the demo model: grouped-query attention, softmax router renormalised over the top-k."""

from offmoe.models.family import Family
from offmoe.models.names import HF_NAMES, feed_forward
from offmoe.models.shared_fields import one_window

NAMES = {**HF_NAMES, **feed_forward("block_sparse_moe.", numbered=True)}
DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": None, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 14336, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0, "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip

FAMILY = Family(
    model_type="mixtral",
    arch="llama",  # llama.cpp's name for it; a dense llama has no experts and is refused
    published="Mixtral-8x7B",
    qk_norm="none",
    renormalise=True,
    defaults=DEFAULTS,
    own={"num_experts": ("num_local_experts", "num_experts"), "moe_intermediate_size": ("intermediate_size",)},
    names=NAMES,
    interleaved_gguf=True,
    configured=one_window,
)
