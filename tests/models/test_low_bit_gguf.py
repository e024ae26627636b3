"""Whole models in IQ1, IQ2 and IQ3, and in several formats as dynamic quantisations mix them, against F32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import rewritten
from exhaustive import cases
from paths import ROOT
from tiny_engines import decoded, engine_of
from tolerance import assert_close

BENCH = str(ROOT / "bench")
sys.path.insert(0, BENCH)  # for a moment: there are common names in that folder
try:
    import shapes
finally:
    sys.path.remove(BENCH)

LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
SMALL = {"layers": 2, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 256, "experts": 6, "top_k": 2,
         "inner": 256, "ctx": 64}  # fmt: skip
IDS = torch.randint(3, 250, (16,), generator=torch.Generator().manual_seed(7)).tolist()
# Of experts: gate and up, down; of each layer. As Unsloth's dynamic files have them.
MIXED = (("IQ2_XXS", "IQ3_XXS"), ("IQ1_M", "Q2_K"))


def in_float32(source: Path, path: Path) -> Path:
    """Write what `gguf` makes of every tensor."""
    values = {}
    for tensor in gguf.GGUFReader(source).tensors:
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values[tensor.name] = rows.reshape(tensor.shape[::-1].tolist()).astype(np.float32)
    return rewritten(source, path, **values)


def check(path: Path, formats: list[set[str]]) -> None:
    """Check that logits are those of the same values in F32, and that greedy tokens do not depend on placement."""
    answers = []
    with engine_of(in_float32(path, path.with_name("wide.gguf")), vram="100%", ram=0) as engine:
        want, _ = decoded(engine, IDS, prompt=9)
    for vram, ram in (("100%", 0), ("51%", "64MiB"), ("51%", 0)):
        with engine_of(path, chunk=5, vram=vram, ram=ram) as engine:
            assert [{part.format for part in layout.parts} for layout in engine.model.layouts] == formats
            logits, _ = decoded(engine, IDS, prompt=9)
            engine.reset()
            list(engine.generate(IDS[:9], temperature=0.0, max_tokens=12))
            answers.append(engine.answer_tokens)
        assert_close(f"{vram} {ram}", logits, want, 1e-4)
    assert len(answers[0]) > 0
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("fmt", cases(LOW, ["IQ1_M", "IQ2_XXS", "IQ3_S"]))
def test_one_format(fmt: str, tmp_path: Path) -> None:
    """All matrices, the embedding and the head."""
    shapes.write("qwen3-30b-a3b", tmp_path / "m.gguf", format=fmt, dense=fmt, head=fmt, **SMALL)
    check(tmp_path / "m.gguf", [{fmt}, {fmt}])


def test_formats_that_differ_by_layer_and_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "tensors", mixed)
    shapes.write("qwen3-30b-a3b", tmp_path / "m.gguf", dense="IQ3_S", head="IQ2_S", **SMALL)
    check(tmp_path / "m.gguf", [set(both) for both in MIXED])


def mixed(shape: dict[str, Any], tensors: Any = shapes.tensors) -> shapes.Tensors:
    rows = []
    for name, fmt, dims in tensors(shape):
        if name.endswith("_exps.weight"):
            fmt = MIXED[int(name.split(".")[1])]["down" in name]
        rows.append((name, fmt, dims))
    return rows
