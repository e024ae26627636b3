"""Rows of a prompt's chunk that are multiplied together on a GPU.

cuBLAS and flash attention choose a kernel, and with it the order of a sum, by the number of rows. Products of ROWS rows
at a time give a row the same bits in every chunk that begins at a multiple of ROWS and holds the row's whole block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 512  # with fewer, a product leaves multiprocessors idle; more tokens would be run again in every turn


def row_blocks(rows: int) -> Iterator[slice]:
    """Yield slices of at most ROWS that cover `rows` from the first on."""
    for first in range(0, rows, ROWS):
        yield slice(first, min(first + ROWS, rows))


def multiplied(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] @ weight [K, N], a block of rows at a time: [T, N]."""
    out = x.new_empty((len(x), weight.shape[1]))
    for rows in row_blocks(len(x)):
        torch.mm(x[rows], weight, out=out[rows])
    return out
