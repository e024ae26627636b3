"""4-bit codes in groups, as AWQ, GPTQ and compressed-tensors publish them: several tensors form one matrix.

AWQ and GPTQ compute x @ W and store W as [in, out], so that an output's row is spread over the whole tensor;
compressed-tensors stores rows. All three are converted to one layout while they are read: kernels.formats.int4_groups.
Sources of the packings: AutoAWQ's awq/utils/packing_utils.py, AutoGPTQ's qlinear_cuda_old.py, compressed-tensors'
pack_quantized/helpers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from offmoe.checkpoint.base import Checkpoint, TensorInfo
from offmoe.checkpoint.parts import MisfitError, Parts, misfit
from offmoe.checkpoint.row_major import Bytes, transpose
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import FORMATS

IN_ORDER, AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7)  # column held by nibble i of a word
MIDDLE = 8  # zero point of symmetric quantisation
# Tensors of a matrix MODULE: its codes, scales, zero points, and the group of each of its columns.
NAMES = {
    "awq": ("qweight", "scales", "qzeros", ""),
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
}
SHAPE = ".weight_shape"  # in compressed-tensors; redundant, since the codes' shape says the same


@dataclass(frozen=True)
class Packing:
    """Packing of all matrices of a checkpoint, as its quantization_config describes it."""

    method: str  # quant_method
    group: int  # columns that share a scale; -1: all columns of a row
    zeros: bool  # each group has its own zero point
    zero_offset: int = 0  # added to the zero points in the file

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
    format: str
    has_zeros: bool
    has_order: bool

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        at = 2 * self.rows * self.groups
        scales, small, codes = raw[:at], raw[at : at + self.small_nbytes], raw[at + self.small_nbytes :]
        zeros = self.check_zeros(small, name)
        scales_and_zeros = scales.view(np.uint16)
        scales_and_zeros = (
            transpose(scales_and_zeros.reshape(self.groups, self.rows))
            if self.packing.transposed
            else scales_and_zeros.reshape(self.rows, -1)
        )
        if zeros is not None:
            scales_and_zeros = np.stack((scales_and_zeros, zeros), -1)
        scales_and_zeros = np.repeat(scales_and_zeros, self.cols // FORMATS[self.format].block // self.groups, axis=1)
        return np.concatenate((scales_and_zeros.view(np.uint8).ravel(), self.row_major(codes)))

    @property
    def small_nbytes(self) -> int:
        """Bytes of the zero points and the groups of columns."""
        return self.has_zeros * 4 * self.zero_words + self.has_order * 4 * self.cols

    @property
    def zero_words(self) -> int:
        """Number of 32-bit words of zero points."""
        return -(-self.rows // 8) * self.groups

    def check_zeros(self, small: Bytes, name: str) -> NDArray[np.uint16] | None:
        """Return zero points [rows, groups], or None if all are 8.

        Raises OffmoeError if zero points or groups of columns contradict the config.
        """
        at = self.has_zeros * 4 * self.zero_words
        if self.has_order:
            self.check_order(small[at:].view(np.int32), name)
        if not self.has_zeros:
            return None
        zeros = self.zero_points(small[:at].view(np.uint32))
        if self.packing.zeros:
            return zeros
        if (other := zeros[zeros != MIDDLE]).size:
            raise OffmoeError(
                f"{name}: a zero point is {other[0]}, and quantization_config says sym: expected only {MIDDLE}"
            )
        return None

    def check_order(self, order: NDArray[np.int32], name: str) -> None:
        """Raise OffmoeError unless column c is in group c // (columns per group)."""
        if (outside := order[(order < 0) | (order >= self.groups)]).size:
            raise OffmoeError(
                f"{name}: its g_idx has a column in group {outside[0]} of {self.groups}: it is damaged; copy it again"
            )
        if not np.array_equal(order, np.arange(self.cols) // (self.cols // self.groups)):
            raise OffmoeError(
                f"{name}: its g_idx has columns in groups out of order (act order), and offmoe implements groups of "
                "consecutive columns: this model cannot be run yet"
            )

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


class Int4Tensors:
    """Packed 4-bit matrices among the tensors of a checkpoint."""

    def __init__(self, parts: Parts, packing: Packing) -> None:
        self.packing, self._parts, self._tensors = packing, parts, parts.tensors

    def matrices(self) -> Iterator[TensorInfo]:
        """Yield MODULE.weight of every module with codes, refused if parts are missing or do not fit."""
        codes = f".{NAMES[self.packing.method][0]}"
        # Codes of type U8 are 4-bit floats: see checkpoint.scaled.
        for info in [info for name, info in self._tensors.items() if name.endswith(codes) and info.format != "U8"]:
            yield self._parts.matrix(info, info.name.removesuffix(codes) + ".weight", self._matrix)

    def _matrix(self, codes_info: TensorInfo) -> TensorInfo:
        """Combine the tensors of one module into a matrix."""
        p, (codes, scale, zero, order) = self.packing, NAMES[self.packing.method]
        module = codes_info.name.removesuffix(f".{codes}")
        if codes_info.format != "I32" or len(codes_info.shape) != 2:
            raise misfit(codes_info.name, codes_info, ("I32",), "of two dimensions")
        a, b = codes_info.shape
        rows, cols = {"awq": (8 * b, a), "gptq": (b, 8 * a)}.get(p.method, (a, 8 * b))
        group = cols if p.group == -1 else p.group
        block = block_size(group)
        if not block or cols % group:
            raise MisfitError(
                f"it has {cols} columns in groups of {group}: expected a whole number of groups of a multiple of 32 "
                "columns; this model cannot be run yet"
            )
        groups, transposed = cols // group, p.transposed
        scales = self._parts.find(
            f"{module}.{scale}", ("F16", "BF16"), (groups, rows) if transposed else (rows, groups)
        )
        has_zeros, has_order = transposed or p.zeros, f"{module}.{order}" in self._tensors
        if not has_zeros and f"{module}.{zero}" in self._tensors:
            raise MisfitError("it has zero points, but quantization_config says symmetric")
        ranges = [scales.range]
        if has_zeros:
            shape = (groups, rows // 8) if transposed else (-(-rows // 8), groups)
            ranges.append(self._parts.find(f"{module}.{zero}", ("I32",), shape).range)
        if has_order:
            ranges.append(self._parts.find(f"{module}.{order}", ("I32",), (cols,)).range)
        self._parts.used.add(module + SHAPE)
        fmt = f"INT4_{block}_{scales.format}" + "_ZEROS" * p.zeros
        converter = Int4ToRowMajor(p, rows, cols, groups, fmt, has_zeros, has_order)
        is_row_major = not (transposed or has_zeros or has_order) and group == block
        return TensorInfo(
            f"{module}.weight", fmt, (rows, cols), codes_info.range, tuple(ranges), None if is_row_major else converter
        )


def check_zero_points(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """Read and check a matrix's zero points and groups of columns, about 1 % of its bytes; see
    Int4ToRowMajor.check_zeros.
    """
    if isinstance(info.row_major, Int4ToRowMajor) and info.row_major.small_nbytes:
        small = [checkpoint.read_range(r).numpy() for r in info.scales[1:]]
        info.row_major.check_zeros(np.concatenate(small), info.name)
