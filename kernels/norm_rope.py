"""RMS norm and rotary embedding, naive."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None) -> Tensor:
    """x [..., H] → x / RMS(x) · weight (arXiv 1910.07467), which None leaves out; the mean is taken in float32. With a
    weight and a bias LayerNorm: of x less its mean, and the bias is added (arXiv 1607.06450)."""
    if weight is not None and bias is not None:
        return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)
    wide = x.float()  # F.rms_norm takes three times as long for one token on the CPU
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight


def rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Rotate x [T, heads, D] by its positions [T] (arXiv 2104.09864); table [2, ctx, R ≤ D]: the first R values."""
    cos, sin = table.index_select(1, positions).to(x.dtype).unsqueeze(2)
    if (rotary := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rope(x[..., :rotary], table, positions), x[..., rotary:]), dim=-1)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
