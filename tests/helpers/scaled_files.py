"""Saved models as Model Optimizer and llm-compressor write them in float8, NVFP4 and MXFP4, by loops and tables:
nothing of the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import int4_files
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wide_models import saved_with_reference

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Tensors = dict[str, Tensor]
INT4 = int4_files.Case("", "compressed-tensors", 32, sym=True, kind=torch.bfloat16)
MIXED = {"mixed": ["nvfp4-pack-quantized"],  # of experts, layer by layer in turn
         "mixed with int4": ["nvfp4-pack-quantized", "pack-quantized"]}  # fmt: skip


def config_of(kind: str) -> dict[str, Any]:
    """The quantization_config of a model whose experts are of that kind, its attention too but where MIXED."""
    if kind.startswith("modelopt"):
        algorithm = {"fp8": "FP8", "nvfp4": "NVFP4", "nvfp4 awq": "NVFP4_AWQ", "int4 awq": "W4A16_AWQ",
                     "mxfp8": "MXFP8", "mxfp4": "W4A8_MXFP4_FP8"}[kind.partition(" ")[2]]  # fmt: skip
        return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], "kv_cache_scheme": None,
                "producer": {"name": "modelopt"}}  # fmt: skip
    floats = {"type": "float", "symmetric": True, "dynamic": False}
    weights: dict[str, dict[str, Any]] = {
        "nvfp4-pack-quantized": {**floats, "num_bits": 4, "strategy": "tensor_group", "group_size": 16},
        "mxfp4-pack-quantized": {**floats, "num_bits": 4, "strategy": "group", "group_size": 32},
        "float-quantized": {**floats, "num_bits": 8, "strategy": "channel"},
        "mxfp8-quantized": {**floats, "num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "uint8"},
        "pack-quantized": INT4.config()["config_groups"]["group_0"]["weights"],
    }
    formats = [*MIXED[kind], "float-quantized"] if kind in MIXED else [kind]
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": weights[name], "format": name}
              for i, name in enumerate(formats)}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "mixed-precision" if kind in MIXED else kind,
            "config_groups": groups, "ignore": ["lm_head"]}  # fmt: skip


def e2m1(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and what they are."""
    codes = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    return (codes | (values < 0).long() << 3).to(torch.uint8), E2M1[codes] * values.sign()


def pairs(codes: Tensor) -> Tensor:
    return codes[:, ::2] | codes[:, 1::2] << 4


def nvfp4(weight: Tensor, divided: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [R, C / 2], scales [R, C / 16], the scale of all, and what they mean."""
    blocks = weight.unflatten(1, (-1, 16))
    whole = weight.abs().max() / (6 * 448)
    small = (blocks.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    if divided:
        whole = 1 / whole
    scale = small.float() / whole if divided else small.float() * whole
    codes, values = e2m1(blocks / scale.clamp(min=1e-30)[..., None])
    return pairs(codes.flatten(1)), small, whole, (values * scale[..., None]).flatten(1)


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = weight.unflatten(1, (-1, 32))
    exponent = (blocks.abs().amax(2) / 4).log2().ceil().clamp(-127)
    codes, values = e2m1(blocks / 2 ** exponent[..., None])
    effective = values * 2 ** exponent[..., None]
    return pairs(codes.flatten(1)), (exponent + 127).to(torch.uint8), effective.flatten(1)


def mxfp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [R, C], exponents [R, C / 32], and what they mean."""
    blocks = weight.unflatten(1, (-1, 32))
    exponent = (blocks.abs().amax(2) / 448).log2().ceil().clamp(-127)
    eight = (blocks / 2 ** exponent[..., None]).to(torch.float8_e4m3fn)
    effective = eight.float() * 2 ** exponent[..., None]
    return eight.flatten(1), (exponent + 127).to(torch.uint8), effective.flatten(1)


def input_factors(weight: Tensor) -> Tensor:
    """Factors of a matrix's inputs [C], as bfloat16 holds them."""
    return (weight.abs().mean(0).sqrt() + 0.1).bfloat16().float()


def packed(name: str, weight: Tensor, kind: str) -> tuple[Tensors, Tensor]:
    """The tensors of one matrix, and what they mean."""
    module, one = name.removesuffix(".weight"), torch.tensor(1.0)
    if kind in MIXED:
        layer = int(name.split(".")[2])
        kind = MIXED[kind][layer % len(MIXED[kind])] if ".experts." in name else "float-quantized"
    if kind == "pack-quantized":
        codes, zeros, scale = int4_files.quantised(weight, INT4)
        return int4_files.packed(module, codes, zeros, scale, INT4), int4_files.meaning(codes, zeros, scale)
    if kind == "modelopt nvfp4":
        codes, small, whole, effective = nvfp4(weight, divided=False)
        return {name: codes, f"{name}_scale": small, f"{name}_scale_2": whole, f"{module}.input_scale": one}, effective
    if kind == "nvfp4-pack-quantized":
        codes, small, whole, effective = nvfp4(weight, divided=True)
        return {f"{name}_packed": codes, f"{name}_scale": small, f"{name}_global_scale": whole.view(1),
                f"{module}.input_global_scale": one.view(1)}, effective  # fmt: skip
    if kind == "modelopt nvfp4 awq":  # all but the gates' inputs have factors: those of norms take them up
        factors = input_factors(weight)
        codes, small, whole, effective = nvfp4(weight / factors, divided=False)
        parts = {name: codes, f"{name}_scale": small, f"{name}_scale_2": whole.bfloat16().float()}
        effective = effective / whole * whole.bfloat16().float()
        if "gate_proj" in name:
            return parts, effective
        return {**parts, f"{module}.pre_quant_scale": factors.bfloat16()}, effective * factors
    if kind == "modelopt int4 awq":
        factors = input_factors(weight)
        groups = (weight / factors).unflatten(1, (-1, 32))
        scale = groups.abs().amax(2) / 7
        codes = (groups / scale[..., None]).round().clamp(-8, 7).flatten(1).long()
        effective = codes * scale.repeat_interleave(32, 1) * factors
        pairs_of_rows = (codes[::2] & 15 | (codes[1::2] & 15) << 4).to(torch.uint8)
        return {name: pairs_of_rows, f"{name}_scale": scale, f"{module}.pre_quant_scale": factors}, effective
    if kind in ("mxfp8-quantized", "modelopt mxfp8"):
        codes, exponents, effective = mxfp8(weight)
        exponents = exponents if kind.startswith("modelopt") else exponents.view(torch.float8_e8m0fnu)
        return {name: codes, f"{name}_scale": exponents}, effective
    if kind in ("mxfp4-pack-quantized", "modelopt mxfp4"):
        codes, small, effective = mxfp4(weight)
        return {name + "_packed" * kind.startswith("mxfp4"): codes, f"{name}_scale": small}, effective
    alone = kind == "modelopt fp8"
    scale = (weight.abs().max() if alone else weight.abs().amax(1, keepdim=True).bfloat16()) / 448
    eight = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: eight, f"{name}_scale": scale}, eight.float() * scale.float()


def quantise(path: Path, kind: str) -> Tensors:
    """Rewrite the model at `path`; return the values that all its tensors now stand for, in float32."""
    file, tensors, effective = path / "model.safetensors", {}, {}
    for name, tensor in load_file(file).items():
        if name.endswith("_proj.weight") or "_proj_with_mqa" in name:
            parts, effective[name] = packed(name, tensor, kind)
            tensors |= {part: value.contiguous() for part, value in parts.items()}
        else:
            effective[name] = tensors[name] = tensor
    save_file(tensors, file)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": config_of(kind)}))
    return effective


CASES = {  # the family, and what its experts become
    "modelopt nvfp4": ("qwen3_moe", "NVFP4"),
    "nvfp4-pack-quantized": ("deepseek_v3", "NVFP4"),
    "mxfp4-pack-quantized": ("qwen3_moe", "MXFP4_PAIRS"),
    "float-quantized": ("qwen2_moe", "F8_E4M3_ROW"),
    "modelopt fp8": ("deepseek_v3", "F8_E4M3_ROW"),
    "modelopt nvfp4 awq": ("qwen2_moe", "F32 NVFP4"),
    "modelopt int4 awq": ("deepseek_v3", "F32"),
    "modelopt mxfp8": ("qwen3_moe", "BF16"),
    "modelopt mxfp4": ("qwen2_moe", "MXFP4_PAIRS"),
    "mxfp8-quantized": ("deepseek_v3", "BF16"),
    "mixed": ("qwen3_moe", "NVFP4"),
    "mixed with int4": ("qwen3_moe", "NVFP4 INT4_32_BF16"),
}


def saved_scaled(folder: Path, kind: str, family: str = "") -> tuple[Path, Any]:
    """Return the quantised directory, and transformers' model of the weights that its bytes stand for."""
    return saved_with_reference(folder, family or CASES[kind][0], lambda path: quantise(path, kind))
