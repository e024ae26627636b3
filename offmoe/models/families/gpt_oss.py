"""gpt-oss (20b, 120b): every second layer sees a window, sinks in attention, biases everywhere, clamped SwiGLU;
experts in MXFP4 (arXiv 2508.10925)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.fields import flag, number
from offmoe.errors import OffmoeError
from offmoe.kernels.feed_forward import Glu
from offmoe.mixers.recurrent import FULL
from offmoe.mixers.rope import RopeConfig
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.names import GGUF_NAMES, HF_NAMES
from offmoe.models.rope import rope_parameters, scaling_of
from offmoe.models.shared_fields import SLIDING, sliding_windows, windowed

MLP = "model.layers.{l}.mlp"


def configured(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """The published yarn does not round its bounds; a GGUF has no key for it."""
    parameters = rope_parameters(raw)
    assert config.heads.rope
    rope = RopeConfig(
        config.heads.rope.rotary,
        number(parameters, "rope_theta", 150_000.0),
        replace(scaling_of(raw), truncate=flag(parameters, "truncate", False)),
    )
    windows = sliding_windows(raw, config, [(SLIDING, FULL)[layer % 2] for layer in range(config.layers)])
    glu = Glu(number(raw, "swiglu_alpha", 1.702), number(raw, "swiglu_limit", 7.0), 1.0)
    config = config.with_moe(router_offset=True, expert_bias=True, glu=glu)
    return windowed(config.with_heads(rope=rope, sinks=True, qkv_bias=True, o_bias=True), windows)


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """Raises OffmoeError where other layers have a window."""
    window, *_ = windows = config.windows
    if any(own != window * (layer % 2 == 0) for layer, own in enumerate(windows)):
        raise OffmoeError(
            f"gpt_oss with windows of {windows} cannot be packed: in a GGUF every second layer, "
            "beginning with the first, has one"
        )
    return {"attention.sliding_window": window}


FAMILY = Family(
    model_type="gpt_oss",
    arch="gpt-oss",
    published="gpt-oss-20b",
    qk_norm="none",
    renormalise=True,  # a softmax over the k logits is one over all, renormalised
    names={
        **HF_NAMES,
        "router": (MLP + ".router.weight",),
        "router_offset": (MLP + ".router.bias",),
        "gate_up": (MLP + ".experts.gate_up_proj",),
        "down": (MLP + ".experts.down_proj",),
        "gate_up_bias": (MLP + ".experts.gate_up_proj_bias",),
        "down_bias": (MLP + ".experts.down_proj_bias",),
    },
    gguf_names={**GGUF_NAMES, "ffn_norm": ("blk.{l}.post_attention_norm.weight",)},
    interleaved_experts=True,
    transposed_experts=True,
    gguf_keys=gguf_keys,
    configured=configured,
    implemented={
        "attention_bias": (True, None),
        "layer_types": (FULL, SLIDING),
        "sliding_window": (),
    },
)
