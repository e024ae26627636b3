"""config.json files of tiny models, as transformers 5 and 4 write them: every field of their class."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from tiny_models import FAMILIES, SHAPE, YARN

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "kimi_k2": FAMILIES["deepseek_v3"],
    "qwen3_vl_moe_text": FAMILIES["qwen3_moe"],
    "qwen2_moe-window": {**FAMILIES["qwen2_moe"], "use_sliding_window": True, "sliding_window": 8},
    "qwen3_moe-window": {**FAMILIES["qwen3_moe"], "use_sliding_window": True, "sliding_window": 8},
    "dots1-window": {**FAMILIES["dots1"], "sliding_window": 8, "max_window_layers": 2},
    "mixtral-window": {**FAMILIES["mixtral"], "sliding_window": 8},
    "mixtral-yarn": {**FAMILIES["mixtral"], "rope_parameters": {**YARN, "attention_factor": 1.25, "truncate": False}},
    "qwen3_moe-llama3": {**FAMILIES["qwen3_moe"], "rope_parameters": LLAMA3},
    "olmoe-linear": {**FAMILIES["olmoe"], "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
}


def kind(name: str) -> str:
    """The model_type of a shape."""
    return name.partition("-")[0]


def complete(raw: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers writes back of a config.json; None where it refuses."""
    model_type = raw["model_type"]
    theirs = "deepseek_v3" if model_type == "kimi_k2" else model_type  # Kimi's own class is a copy
    transformers = pytest.importorskip("transformers")
    fields = json.loads(json.dumps({name: value for name, value in raw.items() if name != "model_type"}))
    try:
        config = transformers.AutoConfig.for_model(theirs, **fields)
    except Exception:  # of its validation or its arithmetic: of many classes
        return None
    whole = {**json.loads(json.dumps(config.to_dict())), "model_type": model_type}
    if model_type != "gemma4_text":  # all of a head is rotated where nothing is said of it
        whole["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return whole


@cache
def written(name: str) -> str:
    """The config.json of a tiny model with every field, as transformers 5 writes it."""
    return json.dumps(complete({**SHAPE, **SHAPES[name], "model_type": kind(name)}))


@cache
def older(name: str) -> str:
    """The same with the rotary embedding as transformers 4 wrote it."""
    raw = json.loads(written(name))
    rope = raw.pop("rope_parameters")
    raw |= {field: rope.pop(field) for field in ("rope_theta", "partial_rotary_factor") if field in rope}
    scaling = {"type": rope.pop("rope_type"), **rope}
    return json.dumps({**raw, "rope_scaling": None if scaling["type"] == "default" else scaling})
