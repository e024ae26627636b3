"""Numbers in the bytes of quantised blocks: scales, and fields of a few bits."""

from __future__ import annotations

import torch
from torch import Tensor

NIBBLES, CRUMBS, BITS = (0x0101010101010101 * ones for ones in (0xF, 0x3, 0x1))


def reinterpret(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., n * itemsize] as `dtype` [..., n]; copied where torch cannot view them (unaligned)."""
    steps = (raw.storage_offset(), *raw.stride()[:-1])
    if raw.stride(-1) == 1 and not any(step % dtype.itemsize for step in steps):
        return raw.view(dtype)
    return raw.clone(memory_format=torch.contiguous_format).view(dtype)


def split(raw: Tensor, *sizes: int) -> Tensor:
    """Split the last dimension into several."""
    return raw.view(*raw.shape[:-1], *sizes)


def half(raw: Tensor) -> Tensor:
    """A block's float16 scale: bytes [..., 2] → float32 [..., 1]."""
    return reinterpret(raw, torch.float16).float()


def fields(raw: Tensor, mask: int, *shifts: int) -> Tensor:
    """Bytes [..., b] → int8 [..., len(shifts), b]: each byte shifted right and masked; b a multiple of 16.

    8 bytes at a time, then put side by side 16 at a time: complex128 is torch's widest element.
    """
    wide = reinterpret(raw, torch.int64)
    parts = [(wide >> shift & mask).view(torch.complex128) for shift in shifts]
    return torch.stack(parts, -2).view(torch.int8)


def nibbles(raw: Tensor) -> Tensor:
    """Bytes [..., b] → int8 [..., 2 * b]: the low nibbles, then the high ones."""
    return fields(raw, NIBBLES, 0, 4).flatten(-2)


def pairs(raw: Tensor) -> Tensor:
    """Bytes [..., b] that hold two neighbours each → int8 [..., 2 * b]."""
    return nibbles(raw).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
