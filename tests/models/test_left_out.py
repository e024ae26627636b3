"""A key that a config.json leaves out, or gives as null, means what transformers' config class makes of it.

transformers writes back a config.json with every field of its class: we read the same out of both.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from config_files import SHAPES, complete, kind, older, written

from offmoe.errors import OffmoeError
from offmoe.models.config import ModelConfig
from offmoe.models.family import all_families, family_of
from offmoe.models.read_config import from_hf

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*rope_scaling:FutureWarning")

NESTED = ("rope_parameters", "rope_scaling", "per_layer_config")
LAYOUTS = {"written": written, "older": older}
CASES = [(name, layout) for name in SHAPES for layout in LAYOUTS if (name, layout) != ("gemma4_text", "older")]


def keys(name: str, layout: str) -> list[str]:
    """Every key, those of nested tables with a dot; of the older layout, what it has elsewhere."""
    family, raw = family_of("model_type", kind(name)), json.loads(LAYOUTS[layout](name))
    top = {*raw, *map(family.name, family.defaults), "rope_theta", "rope_scaling"} - {"model_type"}
    nested = {f"{table}.{key}" for table in NESTED for key in raw.get(table) or {}}
    if family.model_type == "phimoe":  # there transformers 5.23 does not see the one next to the table
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
