"""A saved model as DeepSeek-V3's files are: linear layers in float8, a float32 for every 128 x 128 weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

TILE = 128
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE]}


def quantised(weight: Tensor, powers: bool) -> tuple[Tensor, Tensor]:
    """[R, C] -> codes [R, C], scales [R / 128, C / 128]; powers: of two, as DeepSeek-V3.1 has them."""
    rows, cols = weight.shape
    padded = F.pad(weight, (0, -cols % TILE, 0, -rows % TILE))
    tiles = padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE))
    scales = tiles.abs().amax((1, 3)) / 448
    scales = 2 ** scales.log2().ceil() if powers else scales
    codes = (tiles / scales[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :cols]
    return codes.to(torch.float8_e4m3fn).contiguous(), scales


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """By loops over tiles: nothing of the code under test."""
    weight = codes.float()
    for i, line in enumerate(scales.tolist()):
        for j, scale in enumerate(line):
            weight[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE] *= scale
    return weight


def quantise(path: Path, powers: bool = True) -> dict[str, Tensor]:
    """Rewrite the model at `path`; returns all tensors as they are now meant, in float32."""
    file, tensors, meant = path / "model.safetensors", {}, {}
    for name, tensor in load_file(file).items():
        meant[name] = tensors[name] = tensor
        if name.endswith("_proj.weight") or "_proj_with_mqa" in name:
            tensors[name], scales = quantised(tensor, powers)
            tensors[name + "_scale_inv"] = scales
            meant[name] = dequantised(tensors[name], scales)
    save_file(tensors, file)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return meant
