"""Matrices of float8 and of 4-bit floats, whose scales are tensors of their own: names and shapes say what they are.

float8: NAME and NAME_scale_inv (DeepSeek-V3, Qwen3) or NAME_scale (Model Optimizer, compressed-tensors), which is a
scale for every 128 × 128 weights, for a row, or for all; a stack of experts has a stack of scales. NVFP4: NAME,
NAME_scale and NAME_scale_2 (Model Optimizer), or NAME_packed, NAME_scale and, to divide by, NAME_global_scale
(compressed-tensors). MXFP4: NAME_packed and NAME_scale (compressed-tensors), or gpt-oss's stacks NAME_blocks and
NAME_scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from offmoe.checkpoint.base import Checkpoint, TensorInfo, shown
from offmoe.checkpoint.row_major import Bytes
from offmoe.errors import OffmoeError

EIGHT, BYTES = "F8_E4M3", "U8"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TILED = {"F32": "F8_E4M3", "BF16": "F8_E4M3_BF16"}  # by the type of the scales
TILE = 128
SMOOTHED = ".pre_quant_scale"  # by which a matrix's input is multiplied

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowScales:
    """Puts a scale in float32 before every row, out of `count` of type `kind`: one a row, or one for all; `inverse`: by
    which one divides."""

    rows: int
    count: int
    kind: str
    inverse: bool = False

    def __call__(self, raw: Bytes, name: str) -> Bytes:
        at = self.count * FLOATS[self.kind].itemsize
        scales = torch.from_numpy(raw[:at].copy()).view(FLOATS[self.kind]).float()
        scales = 1 / scales if self.inverse else scales
        spread: Bytes = scales.repeat(self.rows // self.count).view(torch.uint8).numpy()
        return np.concatenate((spread, raw[at:]))


class Scaled:
    """The tensors of a checkpoint, and which of them are parts of such a matrix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path, self.used = checkpoint.path, set[str]()
        self._tensors = checkpoint.tensors | checkpoint.parts

    def matrices(self) -> Iterator[TensorInfo]:
        """Every one. Raises OffmoeError where parts are missing or do not fit."""
        if odd := next((name for name in self._tensors if name.endswith(SMOOTHED)), None):
            raise OffmoeError(
                f"{self.path} has {shown(odd)}, and offmoe implements matrices whose input is not scaled: "
                "this model cannot be run yet"
            )
        infos = list(self._tensors.values())
        yield from (self._four_bits(info) for info in infos if info.format == BYTES and self._is_codes(info.name))
        yield from (self._float8(info) for info in infos if info.format == EIGHT and info.name not in self.used)

    def _is_codes(self, name: str) -> bool:
        stacked = name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in self._tensors
        return stacked or name.endswith((".weight", "_packed"))

    def _four_bits(self, info: TensorInfo) -> TensorInfo:
        whole = info.name.removesuffix("_packed")
        if info.name.endswith("_blocks"):
            return self._stacked(info)
        if whole == info.name:
            return self._nvfp4(info, whole, f"{whole}_scale_2")
        if f"{whole}_global_scale" in self._tensors:
            return self._nvfp4(info, whole, f"{whole}_global_scale", inverse=True)
        rows, cols = self._shape(info, 2, 32)
        scales = self._part(f"{whole}_scale", (BYTES,), (rows, cols // 32))
        self.used.add(info.name)
        return TensorInfo(whole, "MXFP4_PAIRS", (rows, cols), info.range, (scales.range,))

    def _stacked(self, blocks: TensorInfo) -> TensorInfo:
        """[E, R, G, 16] and [E, R, G]: [E, R, 32 G]."""
        whole = blocks.name.removesuffix("_blocks")
        scales = self._part(f"{whole}_scales", (BYTES,), blocks.shape[:-1])
        shape = (*scales.shape[:-1], 32 * scales.shape[-1])
        if blocks.shape[-1] != 16 or len(shape) != 3:
            raise self._odd(blocks.name, blocks, (BYTES,), "[experts, rows, groups, 16]")
        self.used.add(blocks.name)
        return TensorInfo(whole, "MXFP4_PAIRS", shape, blocks.range, (scales.range,))

    def _nvfp4(self, info: TensorInfo, whole: str, of_all: str, inverse: bool = False) -> TensorInfo:
        """An inverse is taken once, as vLLM does: dividing each block's scale, as compressed-tensors does, gives a last
        bit of float32 more or less, and makes the kernels spill."""
        rows, cols = self._shape(info, 2, 32)
        small = self._part(f"{whole}_scale", (EIGHT,), (rows, cols // 16))
        scale = self._part(of_all, ("F32",), (), (1,))
        self.used.add(info.name)
        turn = RowScales(rows, 1, scale.format, inverse)
        return TensorInfo(whole, "NVFP4", (rows, cols), info.range, (scale.range, small.range), turn)

    def _float8(self, info: TensorInfo) -> TensorInfo:
        stack: Shape = info.shape[:-2][:1]
        rows, cols = self._shape(info, 1, 32, stack)
        tiles: Shape = (*stack, -(-rows // TILE), -(-cols // TILE))
        lines: tuple[Shape, ...] = ((*stack, rows, 1), (*stack, rows))
        ones: tuple[Shape, ...] = ((*stack, 1, 1), (*stack, 1), stack) if stack else ((1,), ())
        plain, inverse = f"{info.name}_scale", f"{info.name}_scale_inv"
        name = plain if plain in self._tensors else inverse
        scale, kinds = self._tensors.get(name), tuple(FLOATS)
        if scale is None or scale.format not in kinds or scale.shape not in (tiles, *lines, *ones):
            wanted = (f"for every {TILE} x {TILE} weights, {list(tiles)}, for every row, {list(lines[0])}, "
                      f"or for all, {list(ones[0])}")  # fmt: skip
            raise self._odd(name, scale, kinds, wanted)
        self.used |= {info.name, name}
        whole = cols % TILE == 0 and not (stack and rows % TILE)
        if scale.shape == tiles and whole and (fmt := TILED.get(scale.format)):
            return TensorInfo(info.name, fmt, info.shape, info.range, (scale.range,))
        if scale.shape not in (*lines, *ones):
            wanted = f"for {f'{rows} rows and ' if stack else ''}{cols} columns, of which {TILE} share one"
            raise self._odd(name, scale, tuple(TILED), wanted)
        count = rows if scale.shape in lines else 1
        turn = None if (count, scale.format) == (rows, "F32") else RowScales(rows, count, scale.format)
        return TensorInfo(info.name, "F8_E4M3_ROW", info.shape, info.range, (scale.range,), turn)

    def _shape(self, info: TensorInfo, codes: int, block: int, stack: Shape = ()) -> tuple[int, int]:
        """Of the matrix, or of one of a stack, whose bytes hold so many codes each."""
        if len(info.shape) != 2 + len(stack) or info.shape[-1] * codes % block:
            raise self._odd(info.name, info, (info.format,), f"[rows, columns], of {block} weights or a multiple")
        return info.shape[-2], info.shape[-1] * codes

    def _part(self, name: str, kinds: tuple[str, ...], *shapes: Shape) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None or info.format not in kinds or info.shape not in shapes:
            raise self._odd(name, info, kinds, str(list(shapes[0])))
        self.used.add(name)
        return info

    def _odd(self, name: str, info: TensorInfo | None, kinds: tuple[str, ...], wanted: str) -> OffmoeError:
        given = f"{info.format} {list(info.shape)}" if info else "missing"
        return OffmoeError(f"{self.path}: {shown(name)} is {given}: expected {' or '.join(kinds)} {wanted}")
