"""A key that a config.json leaves out, or gives as null, means what transformers' config class makes of it.

transformers writes back a config.json with every field of its class: we read the same out of both.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from tiny_models import FAMILIES, SHAPE, YARN

from offmoe.errors import OffmoeError
from offmoe.models.config import ModelConfig
from offmoe.models.family import all_families, family_of
from offmoe.models.read_config import from_hf

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*rope_scaling:FutureWarning")

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
NESTED = ("rope_parameters", "rope_scaling", "per_layer_config")


def kind(name: str) -> str:
    """The model_type of a shape."""
    return name.partition("-")[0]


def complete(raw: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers writes back of a config.json; None where it refuses."""
    model_type = raw["model_type"]
    theirs = "deepseek_v3" if model_type == "kimi_k2" else model_type  # Kimi's own class is a copy
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


LAYOUTS = {"written": written, "older": older}
CASES = [(name, layout) for name in SHAPES for layout in LAYOUTS if (name, layout) != ("gemma4_text", "older")]


def keys(name: str, layout: str) -> list[str]:
    """Every key, those of nested tables with a dot; of the older layout, what it has elsewhere."""
    family, raw = family_of("model_type", kind(name)), json.loads(LAYOUTS[layout](name))
    top = {*raw, *map(family.name, family.defaults), "rope_theta", "rope_scaling"} - {"model_type"}
    nested = {f"{table}.{key}" for table in NESTED for key in raw.get(table) or {}}
    if family.model_type == "phimoe":  # there transformers 5.23 does not see the one beside the table
        nested -= {f"{table}.original_max_position_embeddings" for table in NESTED}
    return sorted(nested | {key for key in top if layout == "written" or "rope" in key or "rotary" in key})


def test_every_family_is_walked() -> None:
    walked = {family_of("model_type", kind(name)).model_type for name in SHAPES}
    assert walked == {family.model_type for family in all_families()}


def read(raw: dict[str, Any]) -> ModelConfig | None:
    """Our config; None where it is refused."""
    try:
        return from_hf(raw, family_of("model_type", raw["model_type"]))
    except OffmoeError:
        return None


def misread(name: str, layout: str, *, null: bool) -> list[str]:
    """Keys without which, or with null there, we read another config than transformers."""
    found = []
    for key in keys(name, layout):
        raw = json.loads(LAYOUTS[layout](name))
        table, _, inner = key.rpartition(".")
        place = raw[table] if table else raw
        place.pop(inner, None)
        if null:
            place[inner] = None
        theirs = complete(raw)
        if theirs is not None and read(raw) != read(theirs):
            found.append(key)
    return found


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_key_left_out_is_the_default_of_its_class(name: str, layout: str) -> None:
    assert read(json.loads(LAYOUTS[layout](name))) is not None
    assert misread(name, layout, null=False) == []


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_null_is_what_its_class_makes_of_it(name: str, layout: str) -> None:
    assert misread(name, layout, null=True) == []


@pytest.mark.parametrize("name", SHAPES)
def test_both_layouts_say_the_same(name: str) -> None:
    if name != "gemma4_text":
        assert read(json.loads(written(name))) == read(json.loads(older(name)))
