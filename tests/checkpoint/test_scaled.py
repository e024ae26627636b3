"""float8 with a scale per row or matrix, NVFP4 and MXFP4 in separate tensors: their values, and the files of Model
Optimizer and compressed-tensors.
"""

from __future__ import annotations

from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from exhaustive import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_files import packed
from quantised_checks import check_answers, check_config_refused, check_stacked, check_tensors_refused
from reference import reference_of
from safetensors.torch import save_file
from scaled_files import CASES, E2M1, saved_scaled
from tiny_engines import decoded, engine_of
from torch import Tensor
from wide_models import FAMILIES, IDS

from offmoe.checkpoint.open import open_checkpoint
from offmoe.checkpoint.parts import Parts
from offmoe.checkpoint.scaled import ScaledTensors
from offmoe.kernels.formats import FORMATS, as_it_lies, dequantise, whole_rows


def eights(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Compare bits, except that -0 equals 0."""
    return bool(((got + 0 == want + 0) | (got.isnan() & want.isnan())).all())


@pytest.mark.parametrize("fmt", ["F8_E4M3_ROW", "NVFP4"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_values_are_those_of_the_published_formula(fmt: str, data: st.DataObject) -> None:
    """NVFP4QTensor.dequantize of Model Optimizer, written out; the scales have any bits: 0, denormal, infinite, NaN."""
    rows, cols = 3, 64
    extreme = st.sampled_from([0, 1, 0x80000000, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000]) | st.integers(
        0, 2**32 - 1
    )
    bits = data.draw(st.lists(extreme, min_size=rows, max_size=rows))
    scale = torch.tensor(bits).to(torch.uint32).view(torch.float32)[:, None]
    codes = torch.randint(0, 256, (rows, cols // (1 if fmt.startswith("F8") else 2)), dtype=torch.uint8)
    small = torch.randint(0, 256, (rows, cols // 16), dtype=torch.uint8)
    if fmt == "F8_E4M3_ROW":
        want, parts = eights(codes) * scale, (codes,)
    else:
        block = eights(small) * scale
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()
        want = E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0) * block.repeat_interleave(16, 1)
        parts = (small, codes)
    raw = torch.cat([scale.view(torch.uint8).flatten(), *(part.flatten() for part in parts)])
    assert same_bits(dequantise(raw, fmt, rows, cols), want)
    assert torch.equal(as_it_lies(whole_rows(raw, FORMATS[fmt], rows), FORMATS[fmt]), raw)
    moved = as_it_lies(whole_rows(raw, FORMATS[fmt], rows)[[2, 0]], FORMATS[fmt])
    assert same_bits(dequantise(moved, fmt, 2, cols), want[[2, 0]])


@pytest.mark.parametrize(
    ("kind", "family"), cases(product(CASES, FAMILIES), list(zip(CASES, cycle(FAMILIES), strict=False)))
)
def test_logits_are_those_of_transformers_and_tokens_the_same_at_every_budget(
    kind: str, family: str, tmp_path: Path
) -> None:
    """All experts in slots; and the smallest budget, with a RAM tier of a few rows."""
    path, model = saved_scaled(tmp_path, kind, family)
    each = CASES[kind][1].split()  # one for each layer or part; if the first layer is dense, that of the last
    check_answers(path, IDS, reference_of(model, IDS), lambda formats: formats in (set(each), set(each[-1:])))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the graph itself")
@pytest.mark.parametrize(
    ("kind", "fmt"),
    cases(
        [("mixed", "F8_E4M3_ROW"), ("modelopt nvfp4 awq", "F32"), ("modelopt mxfp8", "BF16")],
        [("mixed", "F8_E4M3_ROW")],
    ),
)
def test_the_step_multiplies_what_it_is_given(kind: str, fmt: str, tmp_path: Path) -> None:
    """Rows of attention keep their scales, even where matrices are concatenated."""
    pytest.importorskip("triton")
    from interpreted_step import IDS as STEP_IDS
    from interpreted_step import run, step_of

    from offmoe.decode.variant import Variant

    path, model = saved_scaled(tmp_path, kind)
    with step_of(path, vram="60%") as step:
        parts = [part for layer in step.trunk.layers for part in (*layer.in_proj, *layer.out_proj)]
        assert {form.format for _, form in parts} == {fmt}
        reference_of(model, STEP_IDS).check_logits(run(step, Variant()))


def test_stacked_experts_are_the_same(tmp_path: Path) -> None:
    path, model = saved_scaled(tmp_path, "float-quantized")
    check_stacked(path, tmp_path, IDS, reference_of(model, IDS))


@pytest.mark.parametrize("shape", [(3, 32, 1), (3, 32), (3, 1, 1), (3, 1), (3,)], ids=str)
def test_scales_of_a_stack_of_float8(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes, scales = torch.randn(3, 32, 64).to(torch.float8_e4m3fn), torch.rand(shape)
    save_file({"e": codes, "e_scale": scales}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        (info,) = ScaledTensors(Parts(checkpoint.tensors)).matrices()
        for expert in range(3):
            raw = checkpoint.matrix(info, expert)
            want = codes[expert].float() * scales[expert].reshape(-1, 1)
            assert torch.equal(dequantise(raw, info.format, 32, 64), want)
            assert torch.equal(checkpoint.rows(info, 32 * expert + 5, 7), want[5:12])


def test_it_packs(tmp_path: Path) -> None:
    path, model = saved_scaled(tmp_path, "modelopt nvfp4")
    with engine_of(packed(path, tmp_path, "f32"), chunk=5) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    reference_of(model, IDS).check_logits(logits, 7)


NV, NAME = "modelopt nvfp4", "model.layers.1.mlp.experts.3.up_proj.weight"
GROUP: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "algorithm": (NV, {"quant_algo": "W4A8_AWQ"}, "of modelopt: quant_algo is 'W4A8_AWQ', and offmoe"),
    "layers": (NV, {"quant_algo": "MIXED_PRECISION", "quantized_layers": {
                        "model.layers.0.self_attn.k_proj": {"quant_algo": "NVFP4_SVD"}}},
               "0.self_attn.k_proj.weight' is described by .* quant_algo is 'NVFP4_SVD', and offmoe implements 'FP8'"),
    "method": (NV, {"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', and offmoe implements"),
    "format": ("nvfp4-pack-quantized", {"config_groups": {"a": {"weights": GROUP, "format": "int-quantized"}}},
               "format is 'int-quantized', and offmoe implements pack-quantized or float-quan"),
    "groups": ("nvfp4-pack-quantized", {"config_groups": {"a": {"weights": {**GROUP, "group_size": 8}}}},
               "group_size is 8, and offmoe implements 16"),
    "rotated": ("nvfp4-pack-quantized", {"transform_config": {"a": 1}}, "transform_config is {'a': 1}, and"),
}  # fmt: skip


@pytest.mark.parametrize("change", CONFIGS)
def test_what_a_config_may_not_ask_for(change: str, tmp_path: Path) -> None:
    kind, values, message = CONFIGS[change]
    path, _ = saved_scaled(tmp_path, kind)
    check_config_refused(path, values, message)


TENSORS: dict[str, tuple[str, Any, str]] = {
    "no scales": (NV, lambda t: t.pop(f"{NAME}_scale"), r"weight_scale' is missing: expected F8_E4M3 \[64, 8\]"),
    "other scales": (NV, lambda t: t.update({f"{NAME}_scale": t[f"{NAME}_scale"][:, :4].clone()}),
                     r"weight_scale' is F8_E4M3 \[64, 4\]: expected F8_E4M3 \[64, 8\]"),
    "no scale of all": (NV, lambda t: t.pop(f"{NAME}_scale_2"),
                        r"_scale_2' is missing: expected F32 or BF16 or F16 \[\]"),
    "smoothed": (NV, lambda t: t.update({NAME.removesuffix("weight") + "pre_quant_scale": torch.ones(64)}),
                 r"F32 \[64\]: expected F32 or BF16 or F16 \[128\]"),
    "low rank": (NV, lambda t: t.update({NAME.removesuffix("weight") + "svdquant_lora_a": torch.ones(4, 128)}),
                 "does not implement the product of .*svdquant_lora_a', which is added"),
    "stacked": (NV, lambda t: t.update({NAME: t[NAME][None].clone()}),
                r"weight_scale' is F8_E4M3 \[64, 8\]: expected F8_E4M3 \[1, 64, 8\]"),
    "groups that do not divide": (NV, lambda t: t.update({NAME: t[NAME][:, :40].clone()}),
                                  r"U8 \[64, 40\]: expected U8 \[rows, columns\], of 32"),
    "float8 alone": ("modelopt fp8", lambda t: t.pop(f"{NAME}_scale"), r"is missing: .* row, \[64, 1\], or for all"),
    "scales of columns": ("float-quantized", lambda t: t.update({f"{NAME}_scale": torch.ones(128)}),
                          r"weight_scale' is F32 \[128\]: .* for every row, \[64, 1\], or for all"),
}  # fmt: skip


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    kind, alter, message = TENSORS[change]
    path, _ = saved_scaled(tmp_path, kind)
    check_tensors_refused(path, alter, message)
