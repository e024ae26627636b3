"""gpt-oss's experts as its safetensors have them: blocks and scales of MXFP4, rows of gate and up in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offmoe.kernels.formats import FORMATS, dequantise
from offmoe.pack.quantise import quantise

EXPERTS = ("gate_up_proj", "down_proj")


def packed(weights: Tensor) -> tuple[Tensor, Tensor]:
    """[E, in, out] → blocks [E, out, in / 32, 16], two neighbours in a byte, and scales [E, out, in / 32]."""
    rows = weights.mT.contiguous()
    raw = quantise(rows.flatten(0, 1), FORMATS["MXFP4"]).view(*rows.shape[:2], -1, 17)
    codes = torch.cat((raw[..., 1:] & 15, raw[..., 1:] >> 4), dim=-1)  # in the order of the weights
    return codes[..., ::2] | codes[..., 1::2] << 4, raw[..., 0].contiguous()


def rounded(weights: Tensor) -> Tensor:
    """To what MXFP4 holds, so that both layouts mean the same."""
    rows = weights.mT.contiguous()
    raw = quantise(rows.flatten(0, 1), FORMATS["MXFP4"])
    return dequantise(raw, "MXFP4", rows.shape[0] * rows.shape[1], rows.shape[2]).view(rows.shape).mT


@torch.no_grad()
def round_experts(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(EXPERTS):
            parameter.copy_(rounded(parameter))


def quantise_experts(path: Path) -> None:
    """Rewrite a saved model, experts of floats, as the published ones are."""
    from safetensors.torch import load_file, save_file

    file, tensors = path / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        if name.endswith(EXPERTS):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, file)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
