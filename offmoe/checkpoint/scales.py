"""Scales of a file in the types that formats have, and conversions of what no format holds in fewer bits.

Each is a converter of one matrix: see checkpoint.row_major.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offmoe.checkpoint.base import TensorInfo
from offmoe.checkpoint.row_major import Bytes, transpose
from offmoe.kernels.formats import dequantise

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EXPONENTS = ("U8", "F8_E8M0")  # of two, biased by 127
ITEMSIZE = {**{kind: dtype.itemsize for kind, dtype in FLOATS.items()}, **dict.fromkeys(EXPONENTS, 1)}
MX_GROUP = 32  # columns that share an exponent


def values(raw: Bytes, kind: str) -> Tensor:
    """Return numbers of a file's type as float32. Of exponents, 255 is NaN."""
    if kind not in EXPONENTS:
        return torch.from_numpy(raw.copy()).view(FLOATS[kind]).float()
    powers = np.ldexp(np.float32(1), raw.astype(np.int32) - 127)
    return torch.from_numpy(np.where(raw == 255, np.float32("nan"), powers))


def bytes_of(weights: Tensor) -> Bytes:
    """Return the bytes of a tensor, uint8 [n]."""
    raw: Bytes = weights.contiguous().view(torch.uint8).numpy().ravel()
    return raw


@dataclass(frozen=True)
class FloatScales:
    """Converter of `count` scales of type `kind`, in front of a matrix, to float32, each repeated `repeats` times.

    inverse: they are divisors. The pieces behind them that are listed in `columns` by their shapes are transposed.
    """

    count: int
    kind: str
    repeats: int = 1
    inverse: bool = False
    columns: tuple[tuple[int, int], ...] = ()

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        at = self.count * ITEMSIZE[self.kind]
        scales = values(raw[:at], self.kind)
        pieces = [bytes_of((1 / scales if self.inverse else scales).repeat_interleave(self.repeats))]
        for high, wide in self.columns:
            pieces.append(transpose(raw[at : at + high * wide].reshape(high, wide)).ravel())
            at += high * wide
        return np.concatenate((*pieces, raw[at:]))


@dataclass(frozen=True)
class MxFloat8ToFloats:
    """Converter of MXFP8, exponents in front, to bfloat16, which holds such products exactly down to 1e-38."""

    rows: int
    cols: int

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        at = self.rows * self.cols // MX_GROUP
        codes = torch.from_numpy(raw[at:].copy()).view(torch.float8_e4m3fn).float()
        return bytes_of((codes.view(-1, MX_GROUP) * values(raw[:at], "U8")[:, None]).bfloat16())


@dataclass(frozen=True)
class RowPairsToFloats:
    """Converter to float32 of Model Optimizer's 4-bit integers, behind a scale for every `group` columns of a row.

    A byte holds the weights of two rows in one column, the first row's in its lower bits, in two's complement.
    """

    rows: int
    cols: int
    group: int
    kind: str

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        at = self.rows * self.cols // self.group * ITEMSIZE[self.kind]
        pairs = raw[at:].view(np.int8).reshape(-1, 1, self.cols)
        codes = np.concatenate((pairs << 4 >> 4, pairs >> 4), axis=1)  # shifts of int8 keep the sign
        weights = torch.from_numpy(codes).float().view(-1, self.group)
        return bytes_of(weights * values(raw[:at], self.kind)[:, None])


@dataclass(frozen=True)
class SmoothedToFloats:
    """Converter to float32 of a matrix whose inputs are multiplied by factors of type `kind`, which lie in front.

    Every column is multiplied by its factor instead. Formats share a scale among columns, and cannot hold that.
    """

    matrix: TensorInfo
    kind: str

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        rows, cols = self.matrix.shape[-2:]
        at = cols * ITEMSIZE[self.kind]
        inner = self.matrix.row_major(raw[at:], name) if self.matrix.row_major else raw[at:]
        weights = dequantise(torch.from_numpy(inner), self.matrix.format, rows, cols)
        return bytes_of(weights * values(raw[:at], self.kind))
