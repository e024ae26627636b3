"""gpt-oss (20b, 120b): every second layer sees a window, sinks in attention, biases everywhere, clamped SwiGLU;
experts in MXFP4 (arXiv 2508.10925)."""

from collections.abc import Callable, Mapping
from typing import Any

from offmoe.checkpoint.fields import number
from offmoe.errors import OffmoeError
from offmoe.kernels.feed_forward import Glu
from offmoe.mixers.recurrent import FULL
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import GGUF_NAMES, HF_NAMES, feed_forward
from offmoe.models.shared_fields import SLIDING, sliding_windows, windowed

MLP = "model.layers.{l}.mlp"


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    windows = sliding_windows(raw, config, [(SLIDING, FULL)[layer % 2] for layer in range(config.layers)])
    glu = Glu(number(raw, "swiglu_alpha", 1.702), number(raw, "swiglu_limit", 7.0), 1.0)
    config = config.with_moe(router_offset=True, expert_bias=True, glu=glu)
    return windowed(config.with_heads(sinks=True, qkv_bias=True, o_bias=True), windows)


def gguf_fields(key: Callable[[str], Any]) -> dict[str, Any]:
    return {"sliding_window": key("attention.sliding_window")}


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """Raises OffmoeError where other layers have a window."""
    window, *_ = windows = config.windows
    if any(own != window * (layer % 2 == 0) for layer, own in enumerate(windows)):
        raise OffmoeError(
            f"gpt_oss with windows of {windows} cannot be packed: in a GGUF every second layer, "
            "beginning with the first, has one"
        )
    return {"attention.sliding_window": window}


DEFAULTS = {
    "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "num_experts": 128, "num_experts_per_tok": 4,
    "moe_intermediate_size": 2880, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0,
    "tie_word_embeddings": False, "sliding_window": 128, "layer_types": None, "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                        "original_max_position_embeddings": 4096},
}  # fmt: skip

FAMILY = Family(
    model_type="gpt_oss",
    arch="gpt-oss",
    published="gpt-oss-20b",
    qk_norm="none",
    renormalise=True,  # a softmax over the k logits is one over all, renormalised
    defaults=DEFAULTS,
    own={"num_experts": ("num_local_experts", "num_experts"), "moe_intermediate_size": ("intermediate_size",)},
    names={
        **HF_NAMES,
        **feed_forward(router="router"),
        "router_offset": (MLP + ".router.bias",),
        "gate_up_bias": (MLP + ".experts.gate_up_proj_bias", MLP + ".experts.gate_up_projs.{e}.bias"),
        "gate_bias": (MLP + ".experts.{e}.gate_proj.bias",),
        "up_bias": (MLP + ".experts.{e}.up_proj.bias",),
        "down_bias": (
            MLP + ".experts.down_proj_bias",
            MLP + ".experts.{e}.down_proj.bias",
            MLP + ".experts.down_projs.{e}.bias",
        ),
    },
    gguf_names={**GGUF_NAMES, "ffn_norm": ("blk.{l}.post_attention_norm.weight",)},
    interleaved_experts=True,
    transposed_experts=True,
    gguf_rounded=False,
    gguf_fields=gguf_fields,
    gguf_keys=gguf_keys,
    configured=configured,
    implemented={
        "attention_bias": (True, None),
        "layer_types": (FULL, SLIDING),
    },
)
