"""4-bit codes in groups, as AWQ, GPTQ and compressed-tensors publish them: several tensors form one matrix.

AWQ and GPTQ compute x @ W and store W as [in, out], so that an output's row is spread over the whole tensor;
compressed-tensors stores rows. All three are converted to one layout while they are read: kernels.formats.int4_groups.
Stacks of experts have stacks of each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import numpy as np
import torch

from offmoe.checkpoint.base import ByteRange, Checkpoint, TensorInfo, quote
from offmoe.checkpoint.int4_rows import ActOrderToFloats, Int4ToRowMajor, Packing, block_size
from offmoe.checkpoint.parts import MisfitError, Parts, Shape, misfit
from offmoe.errors import OffmoeError

# Endings of the tensors of a matrix: its codes, scales, zero points, and the group of each of its columns.
NAMES = {
    "awq": ("qweight", "scales", "qzeros", ""),
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "compressed-tensors": ("_packed", "_scale", "_zero_point", "_g_idx"),
}
SHAPE = "_shape"  # in compressed-tensors; what the codes' shape says, if they have 4 bits


class Int4Tensors:
    """Packed 4-bit matrices among the tensors of a checkpoint."""

    def __init__(self, parts: Parts, packing: Packing) -> None:
        self.packing, self._parts, self._tensors = packing, parts, parts.tensors

    def matrices(self) -> Iterator[TensorInfo]:
        """Yield the matrix of every tensor of codes, refused if parts are missing or do not fit."""
        ending = NAMES[self.packing.method][0]
        # Codes of type U8 are 4-bit floats: see checkpoint.scaled.
        for info in [info for name, info in self._tensors.items() if name.endswith(ending) and info.format != "U8"]:
            yield self._parts.matrix(info, self._stem(info)[1], self._matrix)

    def _stem(self, codes: TensorInfo) -> tuple[str, str]:
        """Return what the names of a matrix's parts begin with, and the matrix's own name."""
        stem = codes.name.removesuffix(NAMES[self.packing.method][0])
        if not self.packing.transposed:
            return stem, stem.removesuffix("_weight")
        return stem, stem[:-1] + (".weight" if len(codes.shape) == 2 else "")

    def _matrix(self, codes: TensorInfo) -> TensorInfo:
        """Combine the tensors of one matrix, or of a stack of them."""
        p, (stem, name), (_, scale, zero, order) = self.packing, self._stem(codes), NAMES[self.packing.method]
        if codes.format != "I32" or not 2 <= len(codes.shape) <= 3 or not prod(codes.shape):
            raise misfit(codes.name, codes, ("I32",), "of two dimensions, or a stack of such")
        stack, (a, b) = codes.shape[:-2], codes.shape[-2:]
        rows, cols = {"awq": (8 * b, a), "gptq": (b, 8 * a)}.get(p.method, (a, 8 * b))
        scales, groups = self._scales(stem + scale, stack, rows)
        if cols % groups or not block_size(cols // groups):
            raise MisfitError(
                f"it has {cols} columns in {groups} groups: expected groups of 32 columns or a multiple; this model "
                "cannot be run yet"
            )
        has_zeros, has_order = (
            stem + zero in self._tensors or bool(p.zeros),
            bool(order) and stem + order in self._tensors,
        )
        ranges = [scales.range]
        if has_zeros:
            shape = (groups, -(-rows // 8)) if p.transposed else (-(-rows // 8), groups)
            ranges.append(self._parts.find(stem + zero, ("I32",), (*stack, *shape)).range)
        if has_order:
            ranges.append(self._order(stem + order, stack, cols))
        self._parts.used.add(stem + SHAPE)
        zeros = has_zeros if p.zeros is None else p.zeros
        converter = Int4ToRowMajor(p, rows, cols, groups, scales.format, zeros, has_zeros, has_order)
        is_row_major = not (p.transposed or has_zeros or has_order) and cols // groups == block_size(cols // groups)
        info = TensorInfo(
            name,
            converter.format,
            (*stack, rows, cols),
            codes.range,
            tuple(ranges),
            None if is_row_major else converter,
        )
        return in_floats(info) if p.act_order and has_order and groups > 1 else info

    def _scales(self, name: str, stack: Shape, rows: int) -> tuple[TensorInfo, int]:
        """Return the scales of a matrix of `rows`, and the number of groups in a row."""
        info, kinds = self._tensors.get(name), ("F16", "BF16")
        shape, at = (info.shape if info else ()), -2 if self.packing.transposed else -1
        groups = shape[at] if len(shape) == len(stack) + 2 else 0
        wanted = (*stack, groups, rows) if self.packing.transposed else (*stack, rows, groups)
        if info is None or info.format not in kinds or shape != wanted or not groups:
            ends = ["groups", rows] if self.packing.transposed else [rows, "groups"]
            raise misfit(name, info, kinds, f"[{', '.join(map(str, (*stack, *ends)))}]")
        self._parts.used.add(name)
        return info, groups

    def _order(self, name: str, stack: Shape, cols: int) -> ByteRange:
        """Return the range of the groups of columns, which a stack may share."""
        info = self._parts.find(name, ("I32",), (*stack, cols), (cols,))
        return replace(info.range, shared=bool(stack) and len(info.shape) == 1)


def in_floats(info: TensorInfo) -> TensorInfo:
    """Return a matrix whose groups may have columns from anywhere, in float32; any other as it is."""
    if not isinstance(info.row_major, Int4ToRowMajor) or not info.row_major.has_order:
        return info
    return replace(info, format="F32", row_major=ActOrderToFloats(info.row_major))


def settled(checkpoint: Checkpoint, info: TensorInfo) -> TensorInfo:
    """Return a matrix as its zero points and groups of columns make it, which are read: about 1 % of its bytes.

    Raises OffmoeError if they contradict the config.
    """
    rows = info.row_major
    if not isinstance(rows, Int4ToRowMajor) or not rows.small_nbytes:
        return info
    small = [checkpoint.read_range(r).numpy() for r in info.ranges()[1:-1]]
    _, order = rows.checked(np.concatenate(small), info.name)
    return info if rows.consecutive(order) else in_floats(info)


def check_bits(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """Raise OffmoeError if the shape that compressed-tensors stores with the codes is not that of 4-bit codes."""
    shape = checkpoint.tensors.get(info.name + SHAPE) or checkpoint.tensors.get(f"{info.name}_weight{SHAPE}")
    if shape is None or shape.format != "I64" or shape.shape != (len(info.shape),):
        return
    stored = checkpoint.read_range(shape.range).view(torch.int64).tolist()
    if stored[-1] != info.shape[-1]:
        bits = 4 * info.shape[-1] / max(1, stored[-1])
        raise OffmoeError(
            f"{quote(shape.name)} is {stored}, so that codes have {bits:.3g} bits, and offmoe implements 4"
        )
