"""4-bit codes in groups: their values, and the files of compressed-tensors, AWQ and GPTQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_files import Case, quantise
from quantised_checks import check_answers
from reference import reference_of
from safetensors.torch import save_file
from test_models import decoded, engine_of, packed
from tiny_models import SHAPE
from tolerance import assert_close
from torch import Tensor

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


WIDE: dict[str, Any] = {**SHAPE, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64,
                        "num_hidden_layers": 2, "num_experts_per_tok": 2, "initializer_range": 0.15}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**WIDE, "num_experts": 6, "head_dim": 32, "norm_topk_prob": True},
    "qwen2_moe": {**WIDE, "num_experts": 6, "shared_expert_intermediate_size": 64},
    "deepseek_v3": {**WIDE, "num_key_value_heads": 4, "n_routed_experts": 6, "n_shared_experts": 1,
                    "first_k_dense_replace": 1, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32,
                    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_group": 1, "topk_group": 1},
    "glm4_moe": {**WIDE, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32,
                 "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5},
}  # fmt: skip
CASES = {
    "awq": Case("deepseek_v3", "awq", 64, sym=False),
    "gptq": Case("qwen3_moe", "gptq", 32, sym=True),
    "gptq_v2": Case("qwen2_moe", "gptq", -1, sym=False, version="gptq_v2"),
    "gptq, asymmetric": Case("qwen3_moe", "gptq", 64, sym=False),
    "packed": Case("qwen3_moe", "compressed-tensors", 32, sym=True, kind=torch.bfloat16),
    "packed, asymmetric": Case("deepseek_v3", "compressed-tensors", 32, sym=False, kind=torch.bfloat16),
}
IDS = torch.randint(3, 96, (20,), generator=torch.Generator().manual_seed(7)).tolist()


def made(folder: Path, name: str, family: str = "") -> tuple[Path, Any]:
    """Save the quantised directory; return it and transformers' model with the same values."""
    transformers, case = pytest.importorskip("transformers"), CASES[name]
    torch.manual_seed(0)
    family = family or case.family
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    path, plain = folder / "int4", folder / "plain"
    for where in (path, plain):
        model.float().eval().save_pretrained(where)
    save_file(quantise(path, case), plain / "model.safetensors", {"format": "pt"})
    return path, transformers.AutoModelForCausalLM.from_pretrained(plain, dtype="float32").eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_and_tokens_the_same_at_every_budget(
    name: str, family: str, tmp_path: Path
) -> None:
    """All experts in slots; and the smallest budget, with a RAM tier so small that experts are read and transposed
    again.
    """
    path, model = made(tmp_path, name, family)
    check_answers(path, IDS, reference_of(model, IDS), lambda formats: all(fmt.startswith("INT4") for fmt in formats))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the graph itself")
def test_the_step_and_a_chunk_multiply_what_they_are_given(tmp_path: Path) -> None:
    """Codes stay as they are, except the keys' half of kv_b, which is transposed in float16."""
    pytest.importorskip("triton")
    import test_prefill
    import test_step

    from offmoe.decode.variant import Variant

    path, model = made(tmp_path, "awq")
    with test_step.step_of(path, vram="60%") as step:
        assert {form.format for layer in step.trunk.layers for _, form in (*layer.in_proj, *layer.out_proj)} == {
            "INT4_64_F16_ZEROS"
        }
        want = reference_of(model, test_step.IDS).exact.logits
        assert_close("logits", test_step.run(step, Variant()), want, 1e-3)
    want = reference_of(model, test_prefill.IDS).exact.logits
    assert_close("logits", test_prefill.prefill(path, 4, 8, vram="60%"), want, 1e-3)


def test_it_packs(tmp_path: Path) -> None:
    path, model = made(tmp_path, "gptq")
    with engine_of(packed(path, tmp_path, "f32"), chunk=5) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    reference_of(model, IDS).check_logits(logits, 7)
