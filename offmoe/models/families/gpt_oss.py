"""gpt-oss (20b, 120b): every second layer sees a window, sinks in attention, biases everywhere, clamped SwiGLU;
experts in MXFP4 (arXiv 2508.10925)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offmoe.errors import OffmoeError
from offmoe.kernels.feed_forward import Glu
from offmoe.kernels.route import Rule
from offmoe.models.config import ModelConfig
from offmoe.models.family import GGUF_NAMES, HF_NAMES, Family
from offmoe.models.fields import flag, number
from offmoe.models.recurrent import FULL
from offmoe.models.rope import rope_parameters, scaling_of
from offmoe.models.shared_fields import SLIDING, sliding_windows

MLP = "model.layers.{l}.mlp"


def fields(raw: Mapping[str, Any], layers: int, rule: Rule) -> dict[str, Any]:
    return {
        # the published yarn does not round its bounds, which a GGUF does not say
        "rope": replace(scaling_of(raw), truncate=flag(rope_parameters(raw), "truncate", False)),
        "rope_theta": number(rope_parameters(raw), "rope_theta", 150_000.0),
        "windows": sliding_windows(raw, layers, [(SLIDING, FULL)[layer % 2] for layer in range(layers)]),
        "sinks": True,
        "qkv_bias": True,
        "o_bias": True,
        "router_offset": True,
        "expert_bias": True,
        "glu": Glu(number(raw, "swiglu_alpha", 1.702), number(raw, "swiglu_limit", 7.0), 1.0),
    }


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """Raises OffmoeError where other layers look at a window."""
    if any(config.window(layer) != config.window(0) * (layer % 2 == 0) for layer in range(config.layers)):
        raise OffmoeError(
            f"gpt_oss with windows of {config.windows} cannot be packed: in a GGUF every second layer, "
            "beginning with the first, looks at one"
        )
    return {"attention.sliding_window": config.window(0)}


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
    fields=fields,
    implemented={
        "attention_bias": (True, None),
        "layer_types": (FULL, SLIDING),
        "sliding_window": (),
    },
)
