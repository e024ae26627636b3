"""Memory of caches by position: reserved at start, and read in whole buckets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offmoe.machine.pinned_memory import host_memory

BUCKET = 256  # attention reads whole buckets, so that shapes change rarely and never with a host's decision


def bucket(length: int, ctx: int) -> int:
    """Positions to read for a context of `length`: a multiple of BUCKET, at most all of `ctx`."""
    return min(ctx, -(-length // BUCKET) * BUCKET)


def zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeroed memory, since masked positions still enter a product; on the CPU pages are taken as the context grows."""
    if device.type == "cpu" and 0 not in shape:
        return host_memory(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    return torch.zeros(shape, device=device, dtype=dtype)
