"""Matrices that lie column by column in their file: turned upright as they are read, so that all else knows rows only.

A turn is called with the bytes of one matrix as they lie in the file, all its ranges one after another, and with the
tensor's name for errors; it gives the bytes that its format has. Readers' threads call it: NumPy and a transposing
copy of torch's keep to one core, and 4 threads turn more than a disk gives (2 to 4 GB/s each).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
ToRowMajor = Callable[[Bytes, str], Bytes]
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by itemsize


@dataclass(frozen=True)
class Columns:
    """Of floats of so many bytes: [cols, rows] → [rows, cols]."""

    rows: int
    cols: int
    itemsize: int

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        return transpose(raw.view(WORDS[self.itemsize]).reshape(self.cols, self.rows)).view(np.uint8).ravel()


def transpose(matrix: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """[n, m] → [m, n], contiguous; torch's copy is up to twice as fast as NumPy's."""
    signed = torch.from_numpy(matrix.view(f"i{matrix.itemsize}"))  # torch has few unsigned types
    transpose: NDArray[np.unsignedinteger] = signed.t().contiguous().numpy().view(matrix.dtype)
    return transpose
