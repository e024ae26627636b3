"""Products of a prompt's chunk on a GPU: quantised matrices are unpacked one at a time for torch's product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offmoe.kernels.gpu.formats.unpack import dequantise_into
from offmoe.kernels.row_blocks import multiplied
from offmoe.mixers.protocols import Part


def product(x: Tensor, parts: Sequence[Part]) -> Tensor:
    """x [T, K] times the transpose of all rows of `parts`, unpacked for this call: [T, N] in the type of x."""
    return multiplied(x, unpacked(parts, x.shape[1], x.dtype).t())


def unpacked(parts: Sequence[Part], cols: int, dtype: torch.dtype) -> Tensor:
    """All rows of `parts`, one part over another: [N, cols]."""
    rows = sum(matrix.rows for _, matrix in parts)
    weight = torch.empty((rows, cols), device=parts[0][0].device, dtype=dtype)
    at = 0
    for buffer, matrix in parts:
        dequantise_into(buffer, matrix, weight[at : at + matrix.rows])
        at += matrix.rows
    return weight
