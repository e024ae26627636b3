"""Files that lie column by column, on a real GPU: the captured graph against transformers on what their bytes mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from int4_files import CASES, ORDERED, saved_int4
from reference import reference_of
from teacher_forcing import graph_logits
from tiny_engines import engine_of
from tiny_models import reference, saved
from tolerance import assert_close
from wide_models import IDS


def logits(path: Path, vram: str) -> torch.Tensor:
    """After a prompt of 8 and each token behind; records come out of a RAM tier of a few rows."""
    with engine_of(path, device="cuda", dtype="f32", vram=vram, ram=0) as engine:
        return graph_logits(engine, IDS[:8], IDS[8:])


@pytest.mark.parametrize("vram", ["60%", "100%"])
@pytest.mark.parametrize("name", [*CASES, *ORDERED])
def test_int4(name: str, vram: str, tmp_path: Path) -> None:
    path, model = saved_int4(tmp_path, name)
    want = reference_of(model, IDS).exact.logits[7:]
    assert_close(name, logits(path, vram), want, 1e-3)  # half of kv_b is transposed in float16


def test_stacked_floats(tmp_path: Path) -> None:
    want = reference("gpt_oss", IDS).exact.logits
    assert_close("gpt_oss", logits(saved("gpt_oss", tmp_path, fused=True), "60%"), want[7:], 1e-4)
