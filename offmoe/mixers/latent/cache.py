"""Cache of latent attention: one row a position, the normed latent and one rotated key for all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.mixers.cache import bucket, zeros


class LatentCache:
    """Rows [ctx, L + R]; a value is the front of its key."""

    def __init__(self, width: int, ctx: int, device: torch.device, dtype: torch.dtype) -> None:
        self.ctx, self.rows = ctx, zeros((ctx, width), device, dtype)

    def tensors(self) -> list[Tensor]:
        return [self.rows]

    def write(self, rows: Tensor, positions: Tensor, length: int) -> Tensor:
        """Store rows [T, L + R] at positions [T]; return the buckets that cover the first `length` positions."""
        self.rows.index_copy_(0, positions, rows.to(self.rows.dtype))
        return self.rows[: bucket(length, self.ctx)]

    def lost(self, position: int, written: int) -> bool:
        """Never: the whole context has room."""
        return False
