"""Cache of latent attention: one row a position, the normed latent and one rotated key for all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.mixers.cache import zeros


class LatentCache:
    """Rows [ctx, L + R]; a value is the front of its key."""

    def __init__(self, width: int, ctx: int, device: torch.device, dtype: torch.dtype) -> None:
        self.ctx, self.rows = ctx, zeros((ctx, width), device, dtype)

    def tensors(self) -> list[Tensor]:
        return [self.rows]

    def write(self, rows: Tensor, positions: Tensor) -> None:
        """Store rows [T, L + R] at positions [T]."""
        self.rows.index_copy_(0, positions, rows.to(self.rows.dtype))

    def lost(self, position: int, written: int) -> bool:
        """Never: the whole context has room."""
        return False
