"""Saved models as AutoAWQ, GPTQModel and llm-compressor write them, packed by loops: nothing of the code under test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Case:
    """A way to write a family; group -1: a scale a row."""

    family: str
    method: str
    group: int
    sym: bool
    kind: torch.dtype = torch.float16
    version: str = "gptq"  # of gptq: the first keeps zero points minus one

    def config(self) -> dict[str, Any]:
        if self.method == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": self.group, "version": "gemm", "zero_point": True}
        if self.method == "gptq":
            return {"quant_method": "gptq", "bits": 4, "group_size": self.group, "desc_act": False, "sym": self.sym,
                    "checkpoint_format": self.version}  # fmt: skip
        weights = {"num_bits": 4, "type": "int", "symmetric": self.sym, "dynamic": False, "actorder": None,
                   "strategy": "channel" if self.group == -1 else "group",
                   "group_size": None if self.group == -1 else self.group}  # fmt: skip
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
                "ignore": ["lm_head"], "quantization_status": "compressed"}  # fmt: skip


def words(codes: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """8 neighbours along `dim` in an int32: nibble i is neighbour order[i]."""
    eights = codes.movedim(dim, -1).unflatten(-1, (-1, 8)).long()
    packed = sum(eights[..., order[i]] << 4 * i for i in range(8))
    assert isinstance(packed, Tensor)
    return torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32).movedim(-1, dim).contiguous()


def quantised(weight: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """[R, C] → codes [R, C], zero points [R, G], scales [R, G]."""
    groups = weight.unflatten(1, (-1, weight.shape[1] if case.group == -1 else case.group))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if case.sym:
        scale = (groups.abs().amax(2) / 7.5).to(case.kind)
        zeros = torch.full_like(scale, 8, dtype=torch.int64)
    else:
        scale = ((high - low) / 15).to(case.kind)
        zeros = (-low / scale.float()).round().clamp(0, 15).long()
    codes = (groups / scale.float()[..., None] + zeros[..., None]).round().clamp(0, 15).long()
    return codes.flatten(1), zeros, scale


def packed(module: str, codes: Tensor, zeros: Tensor, scale: Tensor, case: Case) -> dict[str, Tensor]:
    if case.method == "awq":
        return {f"{module}.qweight": words(codes.t(), 1, AWQ_ORDER), f"{module}.qzeros": words(zeros.t(), 1, AWQ_ORDER),
                f"{module}.scales": scale.t().contiguous()}  # fmt: skip
    if case.method == "gptq":
        stored = zeros - int(case.version == "gptq") & 15
        order = torch.arange(codes.shape[1], dtype=torch.int32) // (codes.shape[1] // scale.shape[1])
        return {f"{module}.qweight": words(codes.t(), 0), f"{module}.qzeros": words(stored.t(), 1),
                f"{module}.scales": scale.t().contiguous(), f"{module}.g_idx": order}  # fmt: skip
    tensors = {f"{module}.weight_packed": words(codes, 1), f"{module}.weight_scale": scale,
               f"{module}.weight_shape": torch.tensor(codes.shape)}  # fmt: skip
    return tensors if case.sym else {**tensors, f"{module}.weight_zero_point": words(zeros, 0)}


def quantise(path: Path, case: Case) -> dict[str, Tensor]:
    """Rewrite the model at `path`; returns all tensors as they are now meant, in float32."""
    file, tensors, meant = path / "model.safetensors", {}, {}
    for name, tensor in load_file(file).items():
        module = name.removesuffix(".weight")
        if name.endswith("_proj.weight") or "_proj_with_mqa" in name:
            codes, zeros, scale = quantised(tensor, case)
            tensors |= packed(module, codes, zeros, scale, case)
            each = codes.shape[1] // scale.shape[1]
            meant[name] = (codes - zeros.repeat_interleave(each, 1)) * scale.float().repeat_interleave(each, 1)
        else:
            meant[name] = tensors[name] = tensor
    save_file(tensors, file)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": case.config()}))
    return meant
