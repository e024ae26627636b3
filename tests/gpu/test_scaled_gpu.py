"""float8 by rows and matrices, NVFP4 and MXFP4, on a real GPU: the captured graph, and a chunk, against transformers on
what the files' bytes mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from reference import reference_of
from scaled_files import CASES, saved_scaled
from stacked_files import KINDS, saved_stacks
from teacher_forcing import graph_logits
from tiny_engines import engine_of
from tolerance import assert_close
from wide_models import IDS


@pytest.mark.parametrize("vram", ["60%", "100%"])
@pytest.mark.parametrize("kind", CASES)
def test_graph_and_chunk(kind: str, vram: str, tmp_path: Path) -> None:
    """Records come out of a RAM tier of a few rows."""
    path, model = saved_scaled(tmp_path, kind)
    with engine_of(path, device="cuda", dtype="f32", vram=vram, ram=0) as engine:
        chunk = engine.prefill(IDS).cpu()
        engine.reset()
        graph = graph_logits(engine, IDS[:8], IDS[8:])
    want = reference_of(model, IDS).exact.logits
    assert_close("graph", graph, want[7:], 1e-3)  # half of kv_b is transposed in float16
    assert_close("chunk", chunk, want[-1], 1e-3)


STACKS = [(kind, "qwen3_moe") for kind in KINDS if kind != "Model Optimizer fp8"]


@pytest.mark.parametrize(
    ("kind", "family"), [*STACKS, ("Model Optimizer fp8", "llama4_text"), ("Model Optimizer nvfp4", "gpt_oss")]
)
def test_stacks(kind: str, family: str, tmp_path: Path) -> None:
    path, model = saved_stacks(tmp_path, kind, family)
    with engine_of(path, device="cuda", dtype="f32", vram="60%", ram=0) as engine:
        graph = graph_logits(engine, IDS[:8], IDS[8:])
    assert_close(kind, graph, reference_of(model, IDS).exact.logits[7:], 1e-4)
