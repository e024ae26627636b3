"""Matrices of float8 and 4-bit floats, whose scales are tensors of their own, recognised by names and shapes.

float8: NAME and NAME_scale_inv (DeepSeek-V3, Qwen3) or NAME_scale (Model Optimizer, compressed-tensors), with one scale
for every 128 × 128 weights, for a row, or for all; a stack of experts has a stack of scales. NVFP4: NAME, NAME_scale
and NAME_scale_2 (Model Optimizer), or NAME_packed, NAME_scale and the divisor NAME_global_scale (compressed-tensors).
MXFP4: NAME_packed and NAME_scale (compressed-tensors), or gpt-oss's stacks NAME_blocks and NAME_scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from offmoe.checkpoint.base import TensorInfo, quote
from offmoe.checkpoint.parts import MisfitError, Parts, Shape, misfit
from offmoe.checkpoint.row_major import Bytes

FLOAT8, BYTES = "F8_E4M3", "U8"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TILED = {"F32": "F8_E4M3", "BF16": "F8_E4M3_BF16"}  # format by the type of the scales
TILE = 128  # rows and columns that share a scale
SMOOTHED = ".pre_quant_scale"  # a factor of a matrix's input


@dataclass(frozen=True)
class RowScales:
    """Converter that puts a float32 scale before every row.

    The file has `count` scales of type `kind`: one per row or one for all; `inverse`: they are divisors.
    """

    rows: int
    count: int
    kind: str
    inverse: bool = False

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        nbytes = self.count * FLOATS[self.kind].itemsize
        scales = torch.from_numpy(raw[:nbytes].copy()).view(FLOATS[self.kind]).float()
        scales = 1 / scales if self.inverse else scales
        repeated: Bytes = scales.repeat(self.rows // self.count).view(torch.uint8).numpy()
        return np.concatenate((repeated, raw[nbytes:]))


class ScaledTensors:
    """Matrices of float8 and 4-bit floats among the tensors of a checkpoint."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._tensors = parts, parts.tensors

    def matrices(self) -> Iterator[TensorInfo]:
        """Yield every scaled matrix, refused if parts are missing or do not fit."""
        infos, form = list(self._tensors.values()), self._parts.matrix
        for info in infos:
            if info.format == BYTES and self._is_codes(info.name):
                yield form(info, info.name.removesuffix("_packed").removesuffix("_blocks"), self._four_bits)
        for info in infos:
            if info.format == FLOAT8 and info.name not in self._parts.used:
                yield form(info, info.name, self._float8)

    def _is_codes(self, name: str) -> bool:
        """Return whether a tensor of bytes holds the codes of a matrix."""
        stacked = name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in self._tensors
        return stacked or name.endswith((".weight", "_packed"))

    def _four_bits(self, info: TensorInfo) -> TensorInfo:
        """Return the NVFP4 or MXFP4 matrix whose codes are `info`."""
        whole = info.name.removesuffix("_packed")
        if (smoothed := whole.removesuffix(".weight") + SMOOTHED) in self._tensors:
            raise MisfitError(f"it has {quote(smoothed)}, and offmoe does not implement scaled inputs")
        if info.name.endswith("_blocks"):
            return self._stacked(info)
        if whole == info.name:
            return self._nvfp4(info, whole, f"{whole}_scale_2")
        if f"{whole}_global_scale" in self._tensors:
            return self._nvfp4(info, whole, f"{whole}_global_scale", inverse=True)
        rows, cols = self._shape(info, 2, 32)
        scales = self._parts.find(f"{whole}_scale", (BYTES,), (rows, cols // 32))
        return TensorInfo(whole, "MXFP4_PAIRS", (rows, cols), info.range, (scales.range,))

    def _stacked(self, blocks: TensorInfo) -> TensorInfo:
        """Return gpt-oss's MXFP4 stack [E, R, 32 G] of codes [E, R, G, 16] and scales [E, R, G]."""
        whole = blocks.name.removesuffix("_blocks")
        scales = self._parts.find(f"{whole}_scales", (BYTES,), blocks.shape[:-1])
        shape = (*scales.shape[:-1], 32 * scales.shape[-1])
        if blocks.shape[-1] != 16 or len(shape) != 3:
            raise misfit(blocks.name, blocks, (BYTES,), "[experts, rows, groups, 16]")
        return TensorInfo(whole, "MXFP4_PAIRS", shape, blocks.range, (scales.range,))

    def _nvfp4(self, info: TensorInfo, whole: str, tensor_scale: str, inverse: bool = False) -> TensorInfo:
        """Return an NVFP4 matrix.

        An inverse scale is inverted once, as in vLLM: dividing each block's scale, as compressed-tensors does, may
        differ in the last bit of float32, and makes the kernels spill registers.
        """
        rows, cols = self._shape(info, 2, 32)
        block_scales = self._parts.find(f"{whole}_scale", (FLOAT8,), (rows, cols // 16))
        scale = self._parts.find(tensor_scale, ("F32",), (), (1,))
        converter = RowScales(rows, 1, scale.format, inverse)
        return TensorInfo(whole, "NVFP4", (rows, cols), info.range, (scale.range, block_scales.range), converter)

    def _float8(self, info: TensorInfo) -> TensorInfo:
        """Return the float8 matrix, or stack of matrices, whose codes are `info`."""
        stack: Shape = info.shape[:-2][:1]
        rows, cols = self._shape(info, 1, 32, stack)
        tile_shape: Shape = (*stack, -(-rows // TILE), -(-cols // TILE))
        row_shapes: tuple[Shape, ...] = ((*stack, rows, 1), (*stack, rows))
        single_shapes: tuple[Shape, ...] = ((*stack, 1, 1), (*stack, 1), stack) if stack else ((1,), ())
        plain, inverse = f"{info.name}_scale", f"{info.name}_scale_inv"
        name = plain if plain in self._tensors else inverse
        scale, kinds = self._tensors.get(name), tuple(FLOATS)
        if scale is None or scale.format not in kinds or scale.shape not in (tile_shape, *row_shapes, *single_shapes):
            wanted = (
                f"for every {TILE} x {TILE} weights, {list(tile_shape)}, for every row, {list(row_shapes[0])}, "
                f"or for all, {list(single_shapes[0])}"
            )
            raise misfit(name, scale, kinds, wanted)
        self._parts.used.add(name)
        whole = cols % TILE == 0 and not (stack and rows % TILE)
        if scale.shape == tile_shape and whole and (fmt := TILED.get(scale.format)):
            return TensorInfo(info.name, fmt, info.shape, info.range, (scale.range,))
        if scale.shape not in (*row_shapes, *single_shapes):
            wanted = f"for {f'{rows} rows and ' if stack else ''}{cols} columns, {TILE} of which share one"
            raise misfit(name, scale, tuple(TILED), wanted)
        count = rows if scale.shape in row_shapes else 1
        converter = None if (count, scale.format) == (rows, "F32") else RowScales(rows, count, scale.format)
        return TensorInfo(info.name, "F8_E4M3_ROW", info.shape, info.range, (scale.range,), converter)

    def _shape(self, info: TensorInfo, codes: int, block: int, stack: Shape = ()) -> tuple[int, int]:
        """Return rows and columns of a matrix, or of each in a stack, whose bytes hold `codes` codes each."""
        if len(info.shape) != 2 + len(stack) or info.shape[-1] * codes % block:
            raise misfit(info.name, info, (info.format,), f"[rows, columns], of {block} weights or a multiple")
        return info.shape[-2], info.shape[-1] * codes
