"""Stacked experts, quantised, by the names of llm-compressor, Model Optimizer, transformers and GPTQModel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import int4_files
import scaled_files
import torch
from safetensors.torch import load_file, save_file
from tiny_models import saved, tiny
from torch import Tensor

Tensors = dict[str, Tensor]
Written = tuple[Tensors, Tensor]  # parts by the endings of their names, and what they mean [E, R, C]
BY_COLUMNS = {"qwen3_moe": False, "olmoe": False, "llama4_text": True, "gpt_oss": True}  # how a family stores stacks
ENDS = ("experts.gate_up_proj", "experts.down_proj")
INT4 = int4_files.Case("", "compressed-tensors", 32, sym=True, kind=torch.bfloat16)
ASYMMETRIC = int4_files.Case("", "compressed-tensors", 32, sym=False)
ORDERED = int4_files.Case("", "compressed-tensors", 32, sym=False, act_order=True)


def stacked(each: list[Tensors]) -> Tensors:
    return {ending: torch.stack([one[ending] for one in each]) for ending in each[0]}


def int4(rows: Tensor, case: int4_files.Case, strip: str) -> Written:
    """[E, R, C] as 4-bit codes in words; `strip` begins the parts' names that int4_files writes."""
    parts, means = [], []
    for weight in rows:
        codes, zeros, scale = int4_files.quantised(weight, case)
        order = int4_files.order_of(weight, case)
        one = int4_files.packed("", codes, zeros, scale, case, order)
        parts.append({name.removeprefix(strip): value for name, value in one.items()})
        means.append(int4_files.meaning(codes, zeros, scale, order))
    found = stacked(parts)
    if "_shape" in found:
        found["_shape"] = torch.tensor(rows.shape)
    return found, torch.stack(means)


def nvfp4(rows: Tensor, divided: bool) -> tuple[list[Tensor], Tensor]:
    """Codes, scales of blocks and of each expert, stacked, and what they mean."""
    *parts, means = zip(*(scaled_files.nvfp4(weight, divided) for weight in rows), strict=True)
    return [torch.stack(part) for part in parts], torch.stack(means)


def llm_nvfp4(rows: Tensor, shape: Callable[[int], tuple[int, ...]] = lambda experts: (experts, 1)) -> Written:
    (codes, small, whole), means = nvfp4(rows, divided=True)
    return {"_packed": codes, "_scale": small, "_global_scale": whole.view(shape(len(rows))),
            "_input_global_scale": torch.ones(1)}, means  # fmt: skip


def modelopt_nvfp4(rows: Tensor) -> Written:
    """By columns, with one scale for all experts: twice the largest's, a power of two more loses nothing."""
    whole = rows.abs().max() / (6 * 448)
    blocks = rows.unflatten(2, (-1, 16))
    small = (blocks.abs().amax(3) / 6 / whole).to(torch.float8_e4m3fn)
    scale = small.float() * whole
    codes, values = scaled_files.e2m1(blocks / scale.clamp(min=1e-30)[..., None])
    pairs = torch.stack([scaled_files.pairs(one) for one in codes.flatten(2)])
    return {"": pairs.mT.contiguous(), "_weight_scale": small.mT.contiguous(), "_weight_scale_2": whole,
            "_input_scale": torch.tensor(1.0)}, (values * scale[..., None]).flatten(2)  # fmt: skip


def modelopt_nvfp4_rows(rows: Tensor) -> Written:
    (codes, small, whole), means = nvfp4(rows, divided=False)
    return {"": codes, "_weight_scale": small, "_weight_scale_2": whole}, means


def modelopt_fp8(rows: Tensor, by_columns: bool = True) -> Written:
    """By columns, with one scale for all."""
    scale = rows.abs().max() / 448
    eight = (rows / scale).to(torch.float8_e4m3fn)
    stored = eight.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn) if by_columns else eight
    return {"": stored, "_weight_scale": scale}, eight.float() * scale


def float8_rows(rows: Tensor) -> Written:
    scale = rows.abs().amax(2, keepdim=True) / 448
    eight = (rows / scale).to(torch.float8_e4m3fn)
    return {"": eight, "_scale": scale}, eight.float() * scale


def mxfp8(rows: Tensor, ending: str = "_weight_scale") -> Written:
    codes, exponents, means = scaled_files.mxfp8(rows.flatten(0, 1))
    return {"": codes.view(rows.shape), ending: exponents.view(*rows.shape[:2], -1)}, means.view(rows.shape)


def mxfp4(rows: Tensor, codes_end: str = "_packed") -> Written:
    codes, exponents, means = scaled_files.mxfp4(rows.flatten(0, 1))
    return {codes_end: codes.view(*rows.shape[:2], -1), "_scale": exponents.view(*rows.shape[:2], -1)}, means.view(
        rows.shape
    )


def under(written: Callable[[Tensor], Written], prefix: str) -> Callable[[Tensor], Written]:
    """The same with other names."""

    def named(rows: Tensor) -> Written:
        parts, means = written(rows)
        return {prefix + ending: value for ending, value in parts.items()}, means

    return named


LLM: dict[str, Any] = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
PACKED = {**LLM, "format": "pack-quantized", "config_groups": INT4.config()["config_groups"]}
GROUP = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
NV = {**LLM, "format": "nvfp4-pack-quantized", "config_groups": {"group_0": {"weights": GROUP}}}
MO = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
GPTQ = int4_files.Case("", "gptq", 32, sym=True)
AWQ = int4_files.Case("", "awq", 32, sym=False)

# How stacks are written, their formats (down has one group, which has no order), and the description.
KINDS: dict[str, tuple[Callable[[Tensor], Written], str, dict[str, Any] | None]] = {
    "llm-compressor nvfp4": (llm_nvfp4, "NVFP4", NV),
    "llm-compressor nvfp4, [E]": (lambda rows: llm_nvfp4(rows, lambda experts: (experts,)), "NVFP4", NV),
    "llm-compressor nvfp4, [E, 1, 1]": (lambda rows: llm_nvfp4(rows, lambda experts: (experts, 1, 1)), "NVFP4", NV),
    "llm-compressor nvfp4 in a module": (under(llm_nvfp4, ".weight"), "NVFP4", NV),
    "llm-compressor int4": (lambda rows: int4(rows, INT4, ".weight"), "INT4_32_BF16", PACKED),
    "llm-compressor int4 in a module": (lambda rows: int4(rows, INT4, ""), "INT4_32_BF16", PACKED),
    "llm-compressor int4, nowhere described": (
        lambda rows: int4(rows, ASYMMETRIC, ".weight"), "INT4_32_F16_ZEROS", None),
    "llm-compressor int4, act order": (lambda rows: int4(rows, ORDERED, ".weight"), "F32 INT4_32_F16_ZEROS", {
        **LLM, "format": "pack-quantized", "config_groups": ORDERED.config()["config_groups"]}),
    "llm-compressor float8": (float8_rows, "F8_E4M3_ROW", None),
    "llm-compressor mxfp4": (mxfp4, "MXFP4_PAIRS", None),
    "Model Optimizer nvfp4": (modelopt_nvfp4, "NVFP4", MO),
    "Model Optimizer nvfp4 by rows": (modelopt_nvfp4_rows, "NVFP4", MO),
    "Model Optimizer fp8": (modelopt_fp8, "F8_E4M3_ROW", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "Model Optimizer fp8 by rows": (lambda rows: modelopt_fp8(rows, by_columns=False), "F8_E4M3_ROW", {
        "quant_method": "modelopt", "quant_algo": "FP8"}),
    "Model Optimizer mxfp8": (mxfp8, "BF16", {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    "transformers mxfp8": (lambda rows: mxfp8(rows, "_scale_inv"), "BF16", {
        "quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}),
    "gptq": (lambda rows: int4(rows, GPTQ, ""), "INT4_32_F16", GPTQ.config()),
    "awq": (lambda rows: int4(rows, AWQ, ""), "INT4_32_F16_ZEROS", AWQ.config()),
}  # fmt: skip


def quantise_stacks(path: Path, kind: str, by_columns: bool) -> Tensors:
    """Rewrite the stacked experts of the model at `path`; return what all its tensors now stand for.

    by_columns: the family stores stacks as [E, C, R].
    """
    write, _, config = KINDS[kind]
    tensors, effective = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if not name.endswith(ENDS):
            effective[name] = tensors[name] = tensor
            continue
        parts, means = write(tensor.mT.contiguous() if by_columns else tensor)
        tensors |= {name + ending: value.contiguous() for ending, value in parts.items()}
        effective[name] = (means.mT if by_columns else means).contiguous()
    save_file(tensors, path / "model.safetensors")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, **({"quantization_config": config} if config else {})}))
    return effective


def saved_stacks(folder: Path, kind: str, family: str = "qwen3_moe") -> tuple[Path, Any]:
    """The quantised directory, and transformers' model of what its bytes mean."""
    path, plain = (saved(family, folder / where, fused=True) for where in ("quantised", "plain"))
    effective = quantise_stacks(path, kind, BY_COLUMNS[family])
    save_file(effective, plain / "model.safetensors", {"format": "pt"})
    return path, type(tiny(family)).from_pretrained(plain, dtype="float32").eval()
