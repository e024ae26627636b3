"""Families whose experts are stacked, as tools that quantise write them: each expert by itself, in the fewer bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exhaustive import cases
from packed_files import packed
from quantised_checks import check_answers
from reference import reference_of
from safetensors.torch import load_file, save_file
from scaled_files import quantise
from tiny_engines import IDS, decoded, engine_of
from tiny_models import saved, tiny
from torch import Tensor

STACKS = {  # gate over up, and down
    "gemma4_text": ("experts.gate_up_proj", "experts.down_proj"),
    "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "llama4_text": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),  # column by column
}
APART = {"granitemoe": "block_sparse_moe.experts", "llama4_text": "feed_forward.experts"}
KINDS = {"float-quantized": "F8_E4M3_ROW", "nvfp4-pack-quantized": "NVFP4"}


def take_apart(tensors: dict[str, Tensor], family: str, base: str) -> dict[str, Tensor]:
    apart = {}
    for name, tensor in tensors.items():
        both = STACKS[family][0]
        if not name.endswith(STACKS[family]):
            apart[name] = tensor
            continue
        layer = re.match(r"model\.layers\.\d+\.", name)[0]  # type: ignore[index]
        each = tensor.mT if family == "llama4_text" else tensor
        for expert, matrix in enumerate(each):
            parts = zip(("gate", "up"), matrix.chunk(2), strict=True) if name.endswith(both) else [("down", matrix)]
            apart |= {f"{layer}{base}.{expert}.{part}_proj.weight": rows.contiguous() for part, rows in parts}
    return apart


def stacked(apart: dict[str, Tensor], like: dict[str, Tensor], family: str, base: str) -> dict[str, Tensor]:
    """The way back."""
    tensors = {}
    for name, tensor in like.items():
        if not name.endswith(STACKS[family]):
            tensors[name] = apart[name]
            continue
        layer = re.match(r"model\.layers\.\d+\.", name)[0]  # type: ignore[index]
        parts = ("gate", "up") if name.endswith(STACKS[family][0]) else ("down",)
        each = [torch.cat([apart[f"{layer}{base}.{expert}.{part}_proj.weight"] for part in parts])
                for expert in range(len(tensor))]  # fmt: skip
        whole = torch.stack(each)
        tensors[name] = (whole.mT if family == "llama4_text" else whole).contiguous()
    return tensors


def made(family: str, kind: str, base: str, folder: Path) -> tuple[Path, Any]:
    """The quantised directory, and transformers' model of what its bytes mean."""
    path, plain = (saved(family, folder / where) for where in ("apart", "plain"))
    like = load_file(plain / "model.safetensors")
    save_file(take_apart(like, family, base), path / "model.safetensors")
    effective = stacked(quantise(path, kind), like, family, base)
    save_file(effective, plain / "model.safetensors", {"format": "pt"})
    return path, type(tiny(family)).from_pretrained(plain, dtype="float32").eval()


CASES = [(family, kind, base) for kind in KINDS for family, base in [
    *APART.items(), ("gemma4_text", "experts"), ("gemma4_text", "moe.experts")]]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "base"), CASES)
def test_logits_are_those_of_transformers_and_tokens_the_same_at_every_budget(
    family: str, kind: str, base: str, tmp_path: Path
) -> None:
    path, model = made(family, kind, base, tmp_path)
    check_answers(path, IDS, reference_of(model, IDS), lambda formats: formats == {KINDS[kind]})


@pytest.mark.parametrize("family", STACKS)
def test_they_pack(family: str, tmp_path: Path) -> None:
    path, model = made(family, "nvfp4-pack-quantized", APART.get(family, "experts"), tmp_path)
    with engine_of(packed(path, tmp_path, "f32"), chunk=5) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    reference_of(model, IDS).check_logits(logits, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the graph itself")
@pytest.mark.parametrize("family", cases(STACKS, ["llama4_text"]))
@pytest.mark.usefixtures("whole_model")
def test_the_step_multiplies_what_it_is_given(family: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from interpreted_step import IDS as STEP_IDS
    from interpreted_step import run, step_of

    from offmoe.decode.variant import Variant

    path, model = made(family, "float-quantized", APART.get(family, "experts"), tmp_path)
    with step_of(path, vram="60%") as step:
        reference_of(model, STEP_IDS).check_logits(run(step, Variant()))
