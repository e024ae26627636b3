"""Conversion of 4-bit codes in groups to rows, as they are read: see checkpoint.int4 for the files that have them.

Sources of the packings: AutoAWQ's awq/utils/packing_utils.py, AutoGPTQ's qlinear_cuda_old.py, compressed-tensors'
pack_quantized/helpers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from offmoe.checkpoint.row_major import Bytes, transpose
from offmoe.checkpoint.scales import bytes_of, values
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import FORMATS

IN_ORDER, AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7)  # column held by nibble i of a word
MIDDLE = 8  # zero point of symmetric quantisation


@dataclass(frozen=True)
class Packing:
    """Packing of all matrices of a checkpoint, as far as the tensors do not say it: groups are seen by their scales."""

    method: str  # quant_method
    zeros: bool | None = None  # each group has its own zero point; None: where there are such tensors
    zero_offset: int = 0  # added to the zero points in the file
    act_order: bool = False  # groups may have any columns, and g_idx says which

    @property
    def transposed(self) -> bool:
        """True if matrices are stored as [in, out]."""
        return self.method != "compressed-tensors"


@dataclass(frozen=True)
class Int4ToRowMajor:
    """Converter of a matrix to row-major order, from its scales, zero points (if `has_zeros`), groups of columns (if
    `has_order`) and codes.

    Scales shared by more columns than a block of the format are repeated.
    """

    packing: Packing
    rows: int
    cols: int
    groups: int
    kind: str  # type of the scales
    zeros: bool  # the format has zero points
    has_zeros: bool
    has_order: bool

    @property
    def format(self) -> str:
        """Name of the format that the conversion results in."""
        return f"INT4_{block_size(self.cols // self.groups)}_{self.kind}" + "_ZEROS" * self.zeros

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        scales_and_zeros, zeros, order, codes = self.pieces(raw, name)
        if not self.consecutive(order):
            raise OffmoeError(
                f"{name}: its g_idx has columns in groups out of order (act order), and neither the config nor the "
                "first expert's tells it: set desc_act in the config"
            )
        if zeros is not None:
            scales_and_zeros = np.stack((scales_and_zeros, zeros), -1)
        scales_and_zeros = np.repeat(scales_and_zeros, self.cols // FORMATS[self.format].block // self.groups, axis=1)
        return np.concatenate((scales_and_zeros.view(np.uint8).ravel(), self.row_major(codes)))

    def pieces(
        self, raw: Bytes, name: str
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint16] | None, NDArray[np.int32] | None, Bytes]:
        """Return scales (their bits) and zero points [rows, groups], groups [cols], and codes as the file has them."""
        at = 2 * self.rows * self.groups
        scales, small, codes = raw[:at].view(np.uint16), raw[at : at + self.small_nbytes], raw[at + self.small_nbytes :]
        zeros, order = self.checked(small, name)
        if self.packing.transposed:
            scales = transpose(scales.reshape(self.groups, self.rows))
        return scales.reshape(self.rows, -1), zeros, order, codes

    def consecutive(self, order: NDArray[np.int32] | None) -> bool:
        """Return whether column c is in group c // (columns per group)."""
        return order is None or np.array_equal(order, np.arange(self.cols) // (self.cols // self.groups))

    @property
    def small_nbytes(self) -> int:
        """Bytes of the zero points and the groups of columns."""
        return self.has_zeros * 4 * self.zero_words + self.has_order * 4 * self.cols

    @property
    def zero_words(self) -> int:
        """Number of 32-bit words of zero points."""
        return -(-self.rows // 8) * self.groups

    def checked(self, small: Bytes, name: str) -> tuple[NDArray[np.uint16] | None, NDArray[np.int32] | None]:
        """Return zero points [rows, groups], None if all are 8, and the group of each column, None if not stored.

        Raises OffmoeError if zero points contradict the config, or a group is not there.
        """
        at, zeros = self.has_zeros * 4 * self.zero_words, None
        order = small[at:].view(np.int32) if self.has_order else None
        if order is not None and (outside := order[(order < 0) | (order >= self.groups)]).size:
            raise OffmoeError(
                f"{name}: its g_idx has a column in group {outside[0]} of {self.groups}: it is damaged; copy it again"
            )
        if self.has_zeros:
            zeros = self.zero_points(small[:at].view(np.uint32))
            if not self.zeros and (other := zeros[zeros != MIDDLE]).size:
                raise OffmoeError(
                    f"{name}: a zero point is {other[0]}, and quantization_config says sym: expected only {MIDDLE}"
                )
        return zeros if self.zeros else None, order

    def zero_points(self, words: NDArray[np.uint32]) -> NDArray[np.uint16]:
        """Return zero points [rows, groups]. The sum with the offset wraps at 4 bits, as in AutoGPTQ."""
        if not self.packing.transposed:
            nibbles = unpack_nibbles(words.reshape(-1, self.groups, 1), IN_ORDER)  # [rows / 8, groups, 8]
            return nibbles.transpose(0, 2, 1).reshape(-1, self.groups)[: self.rows]
        order = AWQ_ORDER if self.packing.method == "awq" else IN_ORDER
        nibbles = unpack_nibbles(words.reshape(self.groups, -1), order)
        return transpose(nibbles + np.uint16(self.packing.zero_offset) & np.uint16(15))

    def row_major(self, codes: Bytes) -> Bytes:
        """Return the codes row by row, two consecutive columns per byte: uint8 [rows · cols / 2]."""
        if self.packing.method == "awq":
            return awq_pairs(codes.view(np.uint32).reshape(self.cols, -1))
        if self.packing.method == "gptq":  # a word holds 8 consecutive columns of a row, the first in its lowest bits
            return transpose(codes.view(np.uint32).reshape(-1, self.rows)).view(np.uint8).ravel()
        return codes


@dataclass(frozen=True)
class ActOrderToFloats:
    """Converter to float32 of a matrix whose groups have columns from anywhere: no format of 4 bits has such groups."""

    matrix: Int4ToRowMajor

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        bits, zeros, order, codes = self.matrix.pieces(raw, name)
        assert order is not None, f"{name} has an order"
        scales = values(bits.view(np.uint8).ravel(), self.matrix.kind).view(bits.shape)
        pairs = self.matrix.row_major(codes).reshape(self.matrix.rows, -1)
        weights = torch.from_numpy(np.stack((pairs & 15, pairs >> 4), -1).reshape(self.matrix.rows, -1)).float()
        groups = torch.from_numpy(order.astype(np.int64))
        offset = MIDDLE if zeros is None else torch.from_numpy(zeros.astype(np.float32))[:, groups]
        return bytes_of((weights - offset) * scales[:, groups])


def unpack_nibbles(words: NDArray[np.uint32], order: tuple[int, ...]) -> NDArray[np.uint16]:
    """Return words [..., n] as nibbles [..., 8 n]; nibble i of a word becomes number order[i]."""
    shifts = np.argsort(order).astype(np.uint32) * np.uint32(4)
    return (words[..., None] >> shifts & np.uint32(15)).astype(np.uint16).reshape(*words.shape[:-1], -1)


def awq_pairs(words: NDArray[np.uint32]) -> Bytes:
    """Convert AWQ's words [cols, rows / 8] to bytes of two columns each, row by row: uint8 [rows · cols / 2]."""
    first, second = words[::2], words[1::2]
    low, high = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0)
    halves = (first & low | (second & low) << np.uint32(4)), (first >> np.uint32(4) & low | second & high)
    pairs = np.empty((words.shape[1], 8, len(first)), np.uint8)
    for nibble, half in enumerate(halves):  # the bytes of `half` are nibbles 0, 2, 4, 6 of the words, or 1, 3, 5, 7
        columns = transpose(half.view(np.uint8))
        pairs[:, AWQ_ORDER[nibble::2]] = columns.reshape(-1, 4, len(first))
    return pairs.ravel()


@cache
def block_size(group: int) -> int:
    """Return the largest block size of which a group of `group` columns is a multiple, or 0."""
    return next((n for n in (128, 64, 32) if group % n == 0), 0)
