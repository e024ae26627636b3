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

from offmoe.checkpoint.base import Checkpoint, TensorInfo, quote
from offmoe.checkpoint.row_major import Bytes
from offmoe.errors import OffmoeError

FLOAT8, BYTES = "F8_E4M3", "U8"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TILED = {"F32": "F8_E4M3", "BF16": "F8_E4M3_BF16"}  # format by the type of the scales
TILE = 128  # rows and columns that share a scale
SMOOTHED = ".pre_quant_scale"  # a factor of a matrix's input

Shape = tuple[int, ...]


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
    """Tensors of a checkpoint with scaled matrices; `used` are those that are part of a matrix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path, self.used = checkpoint.path, set[str]()
        self._tensors = checkpoint.tensors | checkpoint.parts

    def matrices(self) -> Iterator[TensorInfo]:
        """Yield every scaled matrix. Raises OffmoeError if parts are missing or do not fit."""
        if scaled_input := next((name for name in self._tensors if name.endswith(SMOOTHED)), None):
            raise OffmoeError(
                f"{self.path} has {quote(scaled_input)}, and offmoe does not implement matrices with scaled inputs: "
                "this model cannot be run yet"
            )
        infos = list(self._tensors.values())
        yield from (self._four_bits(info) for info in infos if info.format == BYTES and self._is_codes(info.name))
        yield from (self._float8(info) for info in infos if info.format == FLOAT8 and info.name not in self.used)

    def _is_codes(self, name: str) -> bool:
        """Return whether a tensor of bytes holds the codes of a matrix."""
        stacked = name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in self._tensors
        return stacked or name.endswith((".weight", "_packed"))

    def _four_bits(self, info: TensorInfo) -> TensorInfo:
        """Return the NVFP4 or MXFP4 matrix whose codes are `info`."""
        whole = info.name.removesuffix("_packed")
        if info.name.endswith("_blocks"):
            return self._stacked(info)
        if whole == info.name:
            return self._nvfp4(info, whole, f"{whole}_scale_2")
        if f"{whole}_global_scale" in self._tensors:
            return self._nvfp4(info, whole, f"{whole}_global_scale", inverse=True)
        rows, cols = self._shape(info, 2, 32)
        scales = self._find(f"{whole}_scale", (BYTES,), (rows, cols // 32))
        self.used.add(info.name)
        return TensorInfo(whole, "MXFP4_PAIRS", (rows, cols), info.range, (scales.range,))

    def _stacked(self, blocks: TensorInfo) -> TensorInfo:
        """Return gpt-oss's MXFP4 stack [E, R, 32 G] of codes [E, R, G, 16] and scales [E, R, G]."""
        whole = blocks.name.removesuffix("_blocks")
        scales = self._find(f"{whole}_scales", (BYTES,), blocks.shape[:-1])
        shape = (*scales.shape[:-1], 32 * scales.shape[-1])
        if blocks.shape[-1] != 16 or len(shape) != 3:
            raise self._error(blocks.name, blocks, (BYTES,), "[experts, rows, groups, 16]")
        self.used.add(blocks.name)
        return TensorInfo(whole, "MXFP4_PAIRS", shape, blocks.range, (scales.range,))

    def _nvfp4(self, info: TensorInfo, whole: str, tensor_scale: str, inverse: bool = False) -> TensorInfo:
        """Return an NVFP4 matrix.

        An inverse scale is inverted once, as in vLLM: dividing each block's scale, as compressed-tensors does, may
        differ in the last bit of float32, and makes the kernels spill registers.
        """
        rows, cols = self._shape(info, 2, 32)
        block_scales = self._find(f"{whole}_scale", (FLOAT8,), (rows, cols // 16))
        scale = self._find(tensor_scale, ("F32",), (), (1,))
        self.used.add(info.name)
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
            raise self._error(name, scale, kinds, wanted)
        self.used |= {info.name, name}
        whole = cols % TILE == 0 and not (stack and rows % TILE)
        if scale.shape == tile_shape and whole and (fmt := TILED.get(scale.format)):
            return TensorInfo(info.name, fmt, info.shape, info.range, (scale.range,))
        if scale.shape not in (*row_shapes, *single_shapes):
            wanted = f"for {f'{rows} rows and ' if stack else ''}{cols} columns, {TILE} of which share one"
            raise self._error(name, scale, tuple(TILED), wanted)
        count = rows if scale.shape in row_shapes else 1
        converter = None if (count, scale.format) == (rows, "F32") else RowScales(rows, count, scale.format)
        return TensorInfo(info.name, "F8_E4M3_ROW", info.shape, info.range, (scale.range,), converter)

    def _shape(self, info: TensorInfo, codes: int, block: int, stack: Shape = ()) -> tuple[int, int]:
        """Return rows and columns of a matrix, or of each in a stack, whose bytes hold `codes` codes each."""
        if len(info.shape) != 2 + len(stack) or info.shape[-1] * codes % block:
            raise self._error(info.name, info, (info.format,), f"[rows, columns], of {block} weights or a multiple")
        return info.shape[-2], info.shape[-1] * codes

    def _find(self, name: str, kinds: tuple[str, ...], *shapes: Shape) -> TensorInfo:
        """Return a tensor. Raises OffmoeError unless it has one of the types and one of the shapes."""
        info = self._tensors.get(name)
        if info is None or info.format not in kinds or info.shape not in shapes:
            raise self._error(name, info, kinds, str(list(shapes[0])))
        self.used.add(name)
        return info

    def _error(self, name: str, info: TensorInfo | None, kinds: tuple[str, ...], wanted: str) -> OffmoeError:
        """Return the error for a tensor of the wrong type or shape; `info` None: it is missing."""
        found = f"{info.format} {list(info.shape)}" if info else "missing"
        return OffmoeError(f"{self.path}: {quote(name)} is {found}: expected {' or '.join(kinds)} {wanted}")
