"""Stacked experts, quantised: gate over up in one tensor, its scales in others, by every writer's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exhaustive import cases
from packed_files import packed
from quantised_checks import check_answers
from reference import reference_of
from stacked_files import BY_COLUMNS, KINDS, saved_stacks
from tiny_engines import IDS, decoded, engine_of

TELLING = [*((kind, "qwen3_moe") for kind in KINDS if kind != "Model Optimizer fp8"),
           ("Model Optimizer nvfp4", "llama4_text"),
           ("Model Optimizer fp8", "llama4_text"), ("Model Optimizer nvfp4", "gpt_oss"),
           ("llm-compressor int4", "gpt_oss")]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family"), cases([(kind, family) for family in BY_COLUMNS for kind in KINDS], TELLING)
)
def test_logits_are_those_of_transformers_and_tokens_the_same_at_every_budget(
    kind: str, family: str, tmp_path: Path
) -> None:
    if kind in ("Model Optimizer fp8", "Model Optimizer fp8 by rows") and BY_COLUMNS[family] != (kind[-4:] != "rows"):
        pytest.skip("written as the family stores its stacks")
    path, model = saved_stacks(tmp_path, kind, family)
    check_answers(path, IDS[:20], reference_of(model, IDS[:20]), lambda formats: formats <= {*KINDS[kind][1].split()})


@pytest.mark.parametrize("kind", ["Model Optimizer nvfp4", "llm-compressor int4, act order"])
def test_they_pack(kind: str, tmp_path: Path) -> None:
    path, model = saved_stacks(tmp_path, kind)
    with engine_of(packed(path, tmp_path, "f32"), chunk=5) as engine:
        logits, _ = decoded(engine, IDS[:20], prompt=8)
    reference_of(model, IDS[:20]).check_logits(logits, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the graph itself")
@pytest.mark.parametrize("kind", cases(KINDS, ["llm-compressor nvfp4"]))
@pytest.mark.usefixtures("whole_model")
def test_the_step_multiplies_what_it_is_given(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from interpreted_step import IDS as STEP_IDS
    from interpreted_step import run, step_of

    from offmoe.decode.variant import Variant

    family = "llama4_text" if kind == "Model Optimizer fp8" else "qwen3_moe"
    path, model = saved_stacks(tmp_path, kind, family)
    with step_of(path, vram="60%") as step:
        reference_of(model, STEP_IDS).check_logits(run(step, Variant()))
