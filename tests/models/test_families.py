"""Families are found where they lie, and a GGUF is read by the right one of those that share its architecture."""

from __future__ import annotations

import pytest
from paths import ROOT

from offmoe.errors import OffmoeError
from offmoe.models.family import all_families, family_of

FILES = {path.stem for path in (ROOT / "offmoe" / "models" / "families").glob("*.py")} - {"__init__"}


def test_every_file_is_a_family_of_its_name() -> None:
    assert {family.model_type for family in all_families()} == FILES
    assert len(all_families()) == len(FILES)


@pytest.mark.parametrize(("gate", "model_type"), [(2, "deepseek_v3"), (1, "deepseek_v2"), (None, "deepseek_v3")])
def test_a_shared_arch_is_told_by_its_gating(gate: int | None, model_type: str) -> None:
    assert family_of("arch", "deepseek2", gate).model_type == model_type


def test_a_language_model_alone_is_of_the_family_with_vision() -> None:
    assert family_of("model_type", "qwen3_vl_moe_text").model_type == "qwen3_vl_moe"


@pytest.mark.parametrize("value", ["mamba2", None, [[]]])
def test_what_is_of_no_family_is_refused_with_those_that_there_are(value: object) -> None:
    with pytest.raises(OffmoeError, match=r"is not supported; supported are deepseek_v2, deepseek_v3, dots1"):
        family_of("model_type", value)
