"""4-bit codes in groups: their values, and the files of compressed-tensors, AWQ and GPTQ."""

from __future__ import annotations

import json
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from exhaustive import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_files import CASES, ORDERED, saved_int4
from packed_files import packed
from quantised_checks import check_answers
from reference import reference_of
from tiny_engines import decoded, engine_of
from tolerance import assert_close
from torch import Tensor
from wide_models import FAMILIES, IDS

from offmoe.kernels.formats import FORMATS, dequantise

INT4 = [name for name in FORMATS if name.startswith("INT4")]
SCALES = {"F16": torch.float16, "BF16": torch.bfloat16}


def written(codes: Tensor, zeros: Tensor, scale: Tensor) -> Tensor:
    """Return (q - z) · s in the scales' own type, as AutoAWQ, GPTQModel and compressed-tensors dequantise.

    codes [R, C], zeros and scales [R, G].
    """
    codes, zeros = codes.to(scale.dtype), zeros.to(scale.dtype)
    each = codes.shape[1] // scale.shape[1]
    return (codes - zeros.repeat_interleave(each, 1)) * scale.repeat_interleave(each, 1)


def record_bytes(codes: Tensor, zeros: Tensor | None, scale: Tensor) -> Tensor:
    """Return each group's scale and zero point (2 bytes each), then the codes, two consecutive ones per byte."""
    heads = [scale.view(torch.int16), *([] if zeros is None else [zeros.to(torch.int16)])]
    return torch.cat(
        (torch.stack(heads, -1).flatten().view(torch.uint8), (codes[:, ::2] | codes[:, 1::2] << 4).flatten())
    )


@pytest.mark.parametrize("fmt", INT4)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_values_are_those_of_the_published_formula(fmt: str, data: st.DataObject) -> None:
    """Scales have any bits: 0, denormal, infinite, NaN."""
    rows, groups, dtype = 2, 3, SCALES[fmt.split("_")[2]]
    codes = torch.randint(0, 16, (rows, groups * FORMATS[fmt].block), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8) if fmt.endswith("ZEROS") else None
    extreme = st.sampled_from([0, 1, 0x8000, 0x0080, 0x7BFF, 0x7C00, 0x7F80, 0x7FFF, 0xFF80]) | st.integers(0, 65535)
    bits = data.draw(st.lists(extreme, min_size=rows * groups, max_size=rows * groups))
    scale = torch.tensor(bits).to(torch.uint16).view(dtype).view(rows, groups)
    want = written(codes, torch.full((rows, groups), 8) if zeros is None else zeros, scale)
    got = dequantise(record_bytes(codes, zeros, scale), fmt, *codes.shape, dtype)
    same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
    assert same.all()


@pytest.mark.parametrize(
    ("name", "family"), cases(product(CASES, FAMILIES), list(zip(CASES, cycle(FAMILIES), strict=False)))
)
def test_logits_are_those_of_transformers_and_tokens_the_same_at_every_budget(
    name: str, family: str, tmp_path: Path
) -> None:
    """All experts in slots; and the smallest budget, with a RAM tier so small that experts are read and transposed
    again.
    """
    path, model = saved_int4(tmp_path, name, family)
    check_answers(path, IDS, reference_of(model, IDS), lambda formats: all(fmt.startswith("INT4") for fmt in formats))


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
@pytest.mark.parametrize("name", ORDERED)
def test_groups_of_columns_from_anywhere(name: str, told: bool, tmp_path: Path) -> None:
    """They become float32, whether the config tells the order or only g_idx does."""
    path, model = saved_int4(tmp_path, name)
    if not told:
        text = (path / "config.json").read_text().replace('"desc_act": true', '"desc_act": false')
        (path / "config.json").write_text(text.replace('"actorder": "group"', '"actorder": null'))
    check_answers(path, IDS, reference_of(model, IDS), lambda formats: formats == {"F32"})


@pytest.mark.parametrize("name", ORDERED)
def test_an_order_of_consecutive_columns_stays_in_four_bits(name: str, tmp_path: Path) -> None:
    """GPTQ's static_groups, act_group_aware: the config tells an order, and g_idx none."""
    path, model = saved_int4(tmp_path, name.removesuffix(", act order"))
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] |= {"desc_act": True, "static_groups": True}
    (path / "config.json").write_text(json.dumps(raw))
    check_answers(path, IDS, reference_of(model, IDS), lambda formats: all(fmt.startswith("INT4") for fmt in formats))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the graph itself")
def test_the_step_and_a_chunk_multiply_what_they_are_given(tmp_path: Path) -> None:
    """Codes stay as they are, except the keys' half of kv_b, which is transposed in float16."""
    pytest.importorskip("triton")
    from interpreted_prefill import IDS as PROMPT_IDS
    from interpreted_prefill import prefill
    from interpreted_step import IDS as STEP_IDS
    from interpreted_step import run, step_of

    from offmoe.decode.variant import Variant

    path, model = saved_int4(tmp_path, "awq")
    with step_of(path, vram="60%") as step:
        assert {form.format for layer in step.trunk.layers for _, form in (*layer.in_proj, *layer.out_proj)} == {
            "INT4_64_F16_ZEROS"
        }
        want = reference_of(model, STEP_IDS).exact.logits
        assert_close("logits", run(step, Variant()), want, 1e-3)
    want = reference_of(model, PROMPT_IDS).exact.logits
    assert_close("logits", prefill(path, 4, 8, vram="60%"), want, 1e-3)


def test_it_packs(tmp_path: Path) -> None:
    path, model = saved_int4(tmp_path, "gptq")
    with engine_of(packed(path, tmp_path, "f32"), chunk=5) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    reference_of(model, IDS).check_logits(logits, 7)
