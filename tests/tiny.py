"""Tiny random models of every family, made with transformers: our oracle for logits and routing."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

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
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 32,
                  "norm_topk_prob": True, "intermediate_size": 64},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 2,
                "rope_theta": 50_000.0},
    "olmoe": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4, "num_key_value_heads": 4},
    "olmoe-clipped": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4, "clip_qkv": 1.0},
}  # fmt: skip

PACKABLE = [family for family in FAMILIES if family != "olmoe-clipped"]  # clip_qkv is unknown to llama.cpp


@cache
def tiny(family: str) -> Any:
    """The model in float32, the same every time."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family.partition("-")[0], **{**SHAPE, **FAMILIES[family]})
    torch.manual_seed(len(family))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones hide a norm that is left out
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def saved(family: str, folder: Path, fused: bool = False, **save: Any) -> Path:
    """Written as a Hugging Face directory: names per expert, or the fused ones."""
    path = folder / f"{family}-{'fused' if fused else 'split'}"
    tiny(family).save_pretrained(path, save_original_format=not fused, **save)
    return path


@torch.no_grad()
def reference(family: str, ids: list[int], model: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [T, V] and of every layer the routed ids [T, k]."""
    model = model or tiny(family)
    out = model(torch.tensor([ids]), output_router_logits=True)
    k = model.config.num_experts_per_tok
    return out.logits[0], [logits.softmax(-1).topk(k).indices for logits in out.router_logits]
