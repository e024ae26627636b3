"""Codes of 4 bits in groups, as AWQ, GPTQ and compressed-tensors publish them: several tensors that are one matrix.

AWQ and GPTQ multiply x @ W and keep W [in, out], so that a row of ours lies across the whole tensor; compressed-tensors
keeps rows. All three become one form as they are read: kernels.formats.int4_groups. Sources of the packings:
AutoAWQ's awq/utils/packing_utils.py, AutoGPTQ's qlinear_cuda_old.py, compressed-tensors' pack_quantized/helpers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from offmoe.checkpoint.base import Checkpoint, TensorInfo, shown
from offmoe.checkpoint.row_major import Bytes, transpose
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import FORMATS

IN_ORDER, AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 neighbours nibble i of a word is
MIDDLE = 8  # the zero point where there is none
# What a matrix MODULE is kept in: its codes, scales, zero points, and the group of each of its columns.
NAMES = {
    "awq": ("qweight", "scales", "qzeros", ""),
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
}
SHAPE = ".weight_shape"  # of compressed-tensors: what the shape of the codes says too


@dataclass(frozen=True)
class Packing:
    """What a quantization_config says of all its matrices."""

    method: str  # quant_method
    group: int  # columns that share a scale; -1: all of a row
    zeros: bool  # groups have zero points of their own
    plus: int = 0  # by how much these are more than what the file says

    @property
    def transposed(self) -> bool:
        return self.method != "compressed-tensors"


@dataclass(frozen=True)
class Groups:
    """Turns a matrix upright, out of its scales, zero points (where `zeroed`), groups of columns (where `ordered`) and
    codes. Scales that more columns share than a format's block has are repeated."""

    packing: Packing
    rows: int
    cols: int
    groups: int
    format: str
    zeroed: bool
    ordered: bool

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        at = 2 * self.rows * self.groups
        scales, beside, codes = raw[:at], raw[at : at + self.small], raw[at + self.small :]
        zeros = self.checked(beside, name)
        head = scales.view(np.uint16)
        head = (
            transpose(head.reshape(self.groups, self.rows)) if self.packing.transposed else head.reshape(self.rows, -1)
        )
        if zeros is not None:
            head = np.stack((head, zeros), -1)
        head = np.repeat(head, self.cols // FORMATS[self.format].block // self.groups, axis=1)
        return np.concatenate((head.view(np.uint8).ravel(), self.row_major(codes)))

    @property
    def small(self) -> int:
        """Bytes of zero points and columns' groups."""
        return self.zeroed * 4 * self.zero_words + self.ordered * 4 * self.cols

    @property
    def zero_words(self) -> int:
        return -(-self.rows // 8) * self.groups

    def checked(self, beside: Bytes, name: str) -> NDArray[np.uint16] | None:
        """Zero points [rows, groups], None where they are 8. Raises OffmoeError where they or the columns' groups are
        not what the config says."""
        at = self.zeroed * 4 * self.zero_words
        if self.ordered:
            self.check_order(beside[at:].view(np.int32), name)
        if not self.zeroed:
            return None
        zeros = self.zero_points(beside[:at].view(np.uint32))
        if self.packing.zeros:
            return zeros
        if (other := zeros[zeros != MIDDLE]).size:
            raise OffmoeError(
                f"{name}: a zero point is {other[0]}, and quantization_config says sym: expected {MIDDLE} everywhere"
            )
        return None

    def check_order(self, order: NDArray[np.int32], name: str) -> None:
        if (outside := order[(order < 0) | (order >= self.groups)]).size:
            raise OffmoeError(
                f"{name}: its g_idx has a column in group {outside[0]} of {self.groups}: it is damaged; copy it anew"
            )
        if not np.array_equal(order, np.arange(self.cols) // (self.cols // self.groups)):
            raise OffmoeError(
                f"{name}: its g_idx has columns in groups out of order (act order), and offmoe implements groups of "
                "neighbours: this model cannot be run yet"
            )

    def zero_points(self, words: NDArray[np.uint32]) -> NDArray[np.uint16]:
        """[rows, groups]. The sum stays within 4 bits, as in AutoGPTQ."""
        if not self.packing.transposed:
            nibbles = spread(words.reshape(-1, self.groups, 1), IN_ORDER)  # [rows / 8, groups, 8]
            return nibbles.transpose(0, 2, 1).reshape(-1, self.groups)[: self.rows]
        order = AWQ_ORDER if self.packing.method == "awq" else IN_ORDER
        nibbles = spread(words.reshape(self.groups, -1), order)
        return transpose(nibbles + np.uint16(self.packing.plus) & np.uint16(15))

    def row_major(self, codes: Bytes) -> Bytes:
        """Rows · cols / 2, two neighbours in a byte."""
        if self.packing.method == "awq":
            return awq_pairs(codes.view(np.uint32).reshape(self.cols, -1))
        if self.packing.method == "gptq":  # a word has 8 neighbours of a row, the first in its lowest bits
            return transpose(codes.view(np.uint32).reshape(-1, self.rows)).view(np.uint8).ravel()
        return codes


def spread(words: NDArray[np.uint32], order: tuple[int, ...]) -> NDArray[np.uint16]:
    """Words [..., n] → nibbles [..., 8 n]; nibble i of a word is number order[i]."""
    shifts = np.argsort(order).astype(np.uint32) * np.uint32(4)
    return (words[..., None] >> shifts & np.uint32(15)).astype(np.uint16).reshape(*words.shape[:-1], -1)


def awq_pairs(words: NDArray[np.uint32]) -> Bytes:
    """[cols, rows / 8] → bytes of two columns each, row by row: [rows · cols / 2]."""
    first, second = words[::2], words[1::2]
    low, high = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0)
    halves = (first & low | (second & low) << np.uint32(4)), (first >> np.uint32(4) & low | second & high)
    pairs = np.empty((words.shape[1], 8, len(first)), np.uint8)
    for nibble, half in enumerate(halves):  # its bytes are nibbles 0, 2, 4, 6 of the words, or 1, 3, 5, 7
        columns = transpose(half.view(np.uint8))
        pairs[:, AWQ_ORDER[nibble::2]] = columns.reshape(-1, 4, len(first))
    return pairs.ravel()


@cache
def block_of(each: int) -> int:
    """The largest block that a whole number of makes a group of so many columns; 0: there is none."""
    return next((n for n in (128, 64, 32) if each % n == 0), 0)


class Parts:
    """The tensors of a checkpoint that has such matrices, and which of them are parts of one."""

    def __init__(self, checkpoint: Checkpoint, packing: Packing) -> None:
        self.path, self.packing, self.used = checkpoint.path, packing, set[str]()
        self._tensors = checkpoint.tensors | checkpoint.parts

    def matrices(self) -> Iterator[TensorInfo]:
        """MODULE.weight of every module that has codes. Raises OffmoeError where parts are missing or do not fit."""
        codes = f".{NAMES[self.packing.method][0]}"
        mine = [name for name, info in self._tensors.items() if name.endswith(codes) and info.format != "U8"]
        for name in mine:  # bytes of this name are 4-bit floats: see checkpoint.scaled
            yield self._matrix(name.removesuffix(codes))

    def _matrix(self, module: str) -> TensorInfo:
        p, (codes, scale, zero, order) = self.packing, NAMES[self.packing.method]
        whole = self._part(module, codes, ("I32",), None)
        a, b = whole.shape
        rows, cols = {"awq": (8 * b, a), "gptq": (b, 8 * a)}.get(p.method, (a, 8 * b))
        each = cols if p.group == -1 else p.group
        block = block_of(each)
        if not block or cols % each:
            raise OffmoeError(
                f"{self.path}: {shown(module)} has {cols} columns in groups of {each}: expected a whole number of "
                "groups, each a multiple of 32: this model cannot be run yet"
            )
        groups, transposed = cols // each, p.transposed
        scales = self._part(module, scale, ("F16", "BF16"), (groups, rows) if transposed else (rows, groups))
        zeroed, ordered = transposed or p.zeros, f"{module}.{order}" in self._tensors
        if not zeroed and f"{module}.{zero}" in self._tensors:
            raise OffmoeError(f"{self.path}: {shown(module)} has zero points, and quantization_config says symmetric")
        ranges = [scales.range]
        if zeroed:
            shape = (groups, rows // 8) if transposed else (-(-rows // 8), groups)
            ranges.append(self._part(module, zero, ("I32",), shape).range)
        if ordered:
            ranges.append(self._part(module, order, ("I32",), (cols,)).range)
        self.used.add(module + SHAPE)
        fmt = f"INT4_{block}_{scales.format}" + "_ZEROS" * p.zeros
        turn = Groups(p, rows, cols, groups, fmt, zeroed, ordered)
        as_meant = not (transposed or zeroed or ordered) and each == block
        return TensorInfo(f"{module}.weight", fmt, (rows, cols), whole.range, tuple(ranges), None if as_meant else turn)

    def _part(self, module: str, part: str, kinds: tuple[str, ...], shape: tuple[int, ...] | None) -> TensorInfo:
        name = f"{module}.{part}"
        info = self._tensors.get(name)
        if info is None or info.format not in kinds or (len(info.shape) != 2 if shape is None else info.shape != shape):
            given = f"{info.format} {list(info.shape)}" if info else "missing"
            wanted = "two dimensions" if shape is None else str(list(shape))
            raise OffmoeError(f"{self.path}: {shown(name)} is {given}: expected {' or '.join(kinds)}, {wanted}")
        self.used.add(name)
        return info


def check_small(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """Reads a matrix's zero points and columns' groups, a hundredth of it. Raises OffmoeError: see Groups.checked."""
    if isinstance(info.row_major, Groups) and info.row_major.small:
        beside = [checkpoint.read_range(r).numpy() for r in info.scales[1:]]
        info.row_major.checked(np.concatenate(beside), info.name)
