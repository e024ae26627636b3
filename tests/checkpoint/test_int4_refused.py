"""AWQ, GPTQ and compressed-tensors configs that are not implemented are rejected before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from int4_files import saved_int4
from quantised_checks import check_config_refused, check_tensors_refused
from safetensors.torch import load_file, save_file
from tiny_engines import engine_of
from wide_models import IDS

from offmoe.errors import OffmoeError

MODULE = "model.layers.1.mlp.experts.0.up_proj"
ORDER = f"{MODULE}.g_idx"
CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "awq bits": ("awq", {"bits": 8}, "quantization_config of awq: bits is 8, and offmoe implements 4: this model"),
    "awq version": ("awq", {"version": "gemv"}, "version is 'gemv', and offmoe implements 'gemm'"),
    "awq without zero points": ("awq", {"zero_point": False}, "zero_point is False, and offmoe implements True"),
    "gptq bits": ("gptq", {"bits": 3}, "quantization_config of gptq: bits is 3, and offmoe implements 4"),
    "gptq marlin": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', and offmoe implements"),
    "gptq act order": ("gptq", {"desc_act": "yes"}, "desc_act is 'yes', and offmoe implements True or False or None"),
    "packed format": ("packed", {"format": "marlin-24"}, "format is 'marlin-24', and offmoe implements pack-q"),
    "packed bits": ("packed", {"config_groups": {"a": {"weights": {"num_bits": 8}}}}, "num_bits is 8, and offmoe"),
    "packed no groups": ("packed", {"config_groups": {}}, "config_groups is {}, and offmoe implements groups"),
    "unknown": ("packed", {"quant_method": "hqq"}, "quant_method is 'hqq', .*: this model cannot be run yet"),
}  # fmt: skip


@pytest.mark.parametrize("change", CONFIGS)
def test_what_a_config_may_not_ask_for(change: str, tmp_path: Path) -> None:
    name, values, message = CONFIGS[change]
    path, _ = saved_int4(tmp_path, name)
    check_config_refused(path, values, message)


TENSORS: dict[str, tuple[str, Any, str]] = {
    "no scales": ("awq", lambda t: t.pop(f"{MODULE}.scales"), f"{MODULE}.scales' is missing: expected F16 or BF16"),
    "scales of another type": ("awq", lambda t: t.update({f"{MODULE}.scales": t[f"{MODULE}.scales"].float()}),
                               r"scales' is F32 \[2, 64\]: expected F16 or BF16 \[groups, 64\]"),
    "zero points of another shape": ("awq", lambda t: t.update({f"{MODULE}.qzeros": torch.zeros(2, 9).int()}),
                                     r"qzeros' is I32 \[2, 9\]: expected I32 \[2, 8\]"),
    "groups of 16": ("gptq", lambda t: t.update(
        {f"{MODULE}.{part}": t[f"{MODULE}.{part}"].repeat_interleave(2, 0) for part in ("scales", "qzeros")}),
        "has 128 columns in 8 groups: expected groups of 32 columns or a multiple"),
    "8 bits": ("gptq", lambda t: t.update({f"{MODULE}.qweight": t[f"{MODULE}.qweight"].repeat(2, 1)}),
               r"g_idx' is I32 \[128\]: expected I32 \[256\]"),
    "8 bits in compressed-tensors": (
        "packed", lambda t: t.update({f"{MODULE}.weight_shape": torch.tensor([64, 64])}),
        r"weight_shape' is \[64, 64\], so that codes have 8 bits, and offmoe implements 4"),
    "a group that is not there": ("gptq", lambda t: t[ORDER][5].fill_(4), "g_idx has a column in group 4 of 4"),
    "zero points where none are": ("gptq", lambda t: t[f"{MODULE}.qzeros"].zero_(), "a zero point is 1, .* only 8"),
    "zero points that are not said": (
        "packed", lambda t: t.update({f"{MODULE}.weight_zero_point": torch.zeros(8, 4).int()}),
        "a zero point is 0, and quantization_config says sym: expected only 8"),
}  # fmt: skip


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_that_do_not_fit(change: str, tmp_path: Path) -> None:
    name, edit, message = TENSORS[change]
    path, _ = saved_int4(tmp_path, name)
    check_tensors_refused(path, edit, message)


def test_act_order_of_a_later_expert_is_refused_once_it_is_read(tmp_path: Path) -> None:
    path, _ = saved_int4(tmp_path, "gptq")
    tensors = load_file(path / "model.safetensors")
    later = ORDER.replace("experts.0", "experts.5")
    tensors[later] = tensors[later].flip(0).contiguous()
    save_file(tensors, path / "model.safetensors")
    with engine_of(path, vram="51%", ram=0) as engine, pytest.raises(OffmoeError, match=r"experts.5.*\(act order\)"):
        list(engine.generate(IDS, temperature=0.0, max_tokens=24))
