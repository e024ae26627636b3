"""KV cache in int8 with a float32 scale per position and head, naive."""

from __future__ import annotations

import torch
from torch import Tensor

KEYS = 64  # most keys of a tile of kernels.gpu.prefill


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] → int8 [..., D] and the scales [...] float32; the largest of D becomes 127."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return (wide * inverse[..., None]).round().to(torch.int8), largest / 127


def dequantise(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Back: int8 [..., D], scales [...] → `dtype` [..., D]."""
    return (q.float() * scales[..., None].float()).to(dtype)
