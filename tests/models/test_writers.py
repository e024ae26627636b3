"""Every family, quantised by every writer, with the names of transformers 4 (experts apart) and 5 (experts stacked)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import int4_files
import pytest
import scaled_files
import torch
from exhaustive import cases
from safetensors.torch import load_file, save_file
from stacked_files import KINDS
from tiny_engines import IDS, decoded, engine_of
from tiny_models import FAMILIES, saved
from tolerance import assert_close
from torch import Tensor

from offmoe.models.model import open_model

Written = tuple[dict[str, Tensor], Tensor]
COLUMNS = ("llama4", "gpt_oss")  # families that stack experts as [E, C, R]
LINEAR = re.compile(r"(_proj|\bw[123]|_linear|_with_mqa|_layer)\.weight|_proj|experts\.\w+")
LEFT_OUT = re.compile(r"norm|bias|embed|router|lm_head|\bgate\.|conv|shared_expert_gate|in_proj_[ab]|in_proj_ba")
INT4 = int4_files.Case("", "compressed-tensors", 32, sym=True, kind=torch.bfloat16)
GPTQ = int4_files.Case("", "gptq", 32, sym=True)
AWQ = int4_files.Case("", "awq", 32, sym=False)


def in_words(case: int4_files.Case) -> Callable[[str, Tensor], Written]:
    def write(name: str, weight: Tensor) -> Written:
        codes, zeros, scale = int4_files.quantised(weight, case)
        parts = int4_files.packed(name.removesuffix(".weight"), codes, zeros, scale, case)
        return parts, int4_files.meaning(codes, zeros, scale)

    return write


def scaled(kind: str) -> Callable[[str, Tensor], Written]:
    return lambda name, weight: scaled_files.packed(name, weight, kind)


# How a matrix is written, how a stack is (a kind of stacked_files), and the description.
WRITERS: dict[str, tuple[Callable[[str, Tensor], Written], str, dict[str, Any]]] = {
    "llm-compressor int4": (in_words(INT4), "llm-compressor int4", INT4.config()),
    "llm-compressor nvfp4": (scaled("nvfp4-pack-quantized"), "llm-compressor nvfp4",
                             scaled_files.config_of("nvfp4-pack-quantized")),
    "llm-compressor float8": (scaled("float-quantized"), "llm-compressor float8",
                              scaled_files.config_of("float-quantized")),
    "llm-compressor mxfp4": (scaled("mxfp4-pack-quantized"), "llm-compressor mxfp4",
                             scaled_files.config_of("mxfp4-pack-quantized")),
    "Model Optimizer nvfp4": (scaled("modelopt nvfp4"), "Model Optimizer nvfp4",
                              scaled_files.config_of("modelopt nvfp4")),
    "Model Optimizer fp8": (scaled("modelopt fp8"), "Model Optimizer fp8", scaled_files.config_of("modelopt fp8")),
    "Model Optimizer mxfp8": (scaled("modelopt mxfp8"), "Model Optimizer mxfp8",
                              scaled_files.config_of("modelopt mxfp8")),
    "GPTQModel": (in_words(GPTQ), "gptq", GPTQ.config()),
    "AutoAWQ": (in_words(AWQ), "awq", AWQ.config()),
}  # fmt: skip
ALL = [(writer, family, fused) for family in FAMILIES for writer in WRITERS for fused in (False, True)]
TELLING = [(writer, family, fused) for family, writer, fused in zip(FAMILIES, cycle(WRITERS), cycle((True, False)),
                                                                     strict=False)]  # fmt: skip


def quantise(path: Path, writer: str, family: str) -> dict[str, Tensor]:
    """Rewrite the model at `path`; return what all its tensors now stand for."""
    matrix, kind, config = WRITERS[writer]
    tensors, effective = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        effective[name] = tensors[name] = tensor
        if LEFT_OUT.search(name) or not LINEAR.search(name):
            continue
        by_columns = family.startswith(COLUMNS)
        if tensor.dim() == 3 and not min(tensor.shape[1:]) % 32:
            stack = KINDS[kind][0] if by_columns else KINDS.get(f"{kind} by rows", KINDS[kind])[0]
            parts, means = stack(tensor.mT.contiguous() if by_columns else tensor)
            effective[name] = (means.mT if by_columns else means).contiguous()
            del tensors[name]
            tensors |= {name + ending: value.contiguous() for ending, value in parts.items()}
        elif tensor.dim() == 2 and not tensor.shape[0] % 8 and not tensor.shape[1] % 32:
            parts, effective[name] = matrix(name, tensor)
            del tensors[name]
            tensors |= {part: value.contiguous() for part, value in parts.items()}
    save_file(tensors, path / "model.safetensors")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return effective


@pytest.mark.parametrize(("writer", "family", "fused"), cases(ALL, TELLING))
def test_weights_are_those_that_the_files_mean(writer: str, family: str, fused: bool, tmp_path: Path) -> None:
    """The same as from a file of the dequantised weights, which other tests compare with transformers."""
    if family.startswith("gpt_oss"):
        fused = True  # saved apart it is MXFP4
    path, plain = (saved(family, tmp_path / where, fused=fused) for where in ("quantised", "plain"))
    save_file(quantise(path, writer, family), plain / "model.safetensors", {"format": "pt"})
    formats = {part.format for layout in open_model(path).layouts for part in layout.parts}
    assert "F32" not in formats, "experts were not quantised"
    with engine_of(path, chunk=5, vram="51%") as engine, engine_of(plain, chunk=5, vram="51%") as whole:
        got, want = (decoded(one, IDS[:12], prompt=8)[0] for one in (engine, whole))
    bound = 3e-6 if "nvfp4" in writer else 0.0  # a divisor is inverted: the last bit of float32
    assert_close("logits", got, want, bound) if bound else torch.testing.assert_close(got, want, rtol=0, atol=0)
