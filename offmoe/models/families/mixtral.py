"""Mixtral (8x7B, 8x22B) and the demo model: grouped-query attention, softmax router renormalised over the top-k."""

from offmoe.models.family import Family
from offmoe.models.names import HF_NAMES

BLOCK = "model.layers.{l}.block_sparse_moe"
MIXTRAL_NAMES = {
    **HF_NAMES,
    "router": (BLOCK + ".gate.weight", *HF_NAMES["router"]),
    "gate": (BLOCK + ".experts.{e}.w1.weight",),
    "up": (BLOCK + ".experts.{e}.w3.weight",),
    "down": (BLOCK + ".experts.{e}.w2.weight", "model.layers.{l}.mlp.experts.down_proj"),
}

FAMILY = Family(
    model_type="mixtral",
    arch="llama",  # llama.cpp's name for it; a dense llama has no experts and is refused
    published="Mixtral-8x7B",
    qk_norm="none",
    renormalise=True,
    names=MIXTRAL_NAMES,
    interleaved_gguf=True,
)
