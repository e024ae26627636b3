"""Models as tiny as groups of 128 weights allow, for files that are quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import SHAPE
from torch import Tensor

WIDE: dict[str, Any] = {**SHAPE, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64,
                        "num_hidden_layers": 2, "num_experts_per_tok": 2, "initializer_range": 0.15}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**WIDE, "num_experts": 6, "head_dim": 32, "norm_topk_prob": True},
    "qwen2_moe": {**WIDE, "num_experts": 6, "shared_expert_intermediate_size": 64},
    "deepseek_v3": {**WIDE, "num_key_value_heads": 4, "n_routed_experts": 6, "n_shared_experts": 1,
                    "first_k_dense_replace": 1, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32,
                    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_group": 1, "topk_group": 1},
    "glm4_moe": {**WIDE, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32,
                 "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5},
}  # fmt: skip
IDS = torch.randint(3, 96, (20,), generator=torch.Generator().manual_seed(7)).tolist()


@torch.no_grad()
def logits_of(model: Any, ids: list[int] = IDS) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


def saved_with_reference(folder: Path, family: str, quantise: Callable[[Path], dict[str, Tensor]]) -> tuple[Path, Any]:
    """Save a model, rewrite its directory with `quantise`, and return it with transformers' model of the weights that
    `quantise` says its bytes stand for."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    path, plain = folder / "quantised", folder / "plain"
    for where in (path, plain):
        model.save_pretrained(where)
    save_file(quantise(path), plain / "model.safetensors", {"format": "pt"})
    return path, transformers.AutoModelForCausalLM.from_pretrained(plain, dtype="float32").eval()
