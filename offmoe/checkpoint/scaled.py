"""Matrices of float8 and 4-bit numbers, whose scales are tensors of their own, recognised by names, types and shapes.

Of a matrix NAME, which is MODULE.weight or, stacked, experts.gate_up_proj or experts.down_proj, files have

- float8: NAME, and NAME_scale_inv (DeepSeek, Qwen3) or NAME_scale (Model Optimizer, compressed-tensors), for every
  128 × 128 weights, for a row or for all, as floats or as exponents (UE8M0); MXFP8: an exponent for every 32 weights;
- NVFP4: NAME, NAME_scale and NAME_scale_2 (Model Optimizer), or NAME_packed, NAME_scale and the divisor
  NAME_global_scale (compressed-tensors);
- MXFP4: NAME or NAME_packed, and NAME_scale; or gpt-oss's stacks NAME_blocks and NAME_scales;
- 4-bit integers of Model Optimizer: NAME, which has half as many rows, and NAME_scale.

In stacks Model Optimizer writes _weight_scale where others have _scale, and stores NVFP4 as [experts, columns, rows].
MODULE.pre_quant_scale has a factor for every input of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from offmoe.checkpoint.base import ByteRange, TensorInfo, quote
from offmoe.checkpoint.parts import MisfitError, Parts, Shape, misfit
from offmoe.checkpoint.scales import (
    EXPONENTS,
    FLOATS,
    MX_GROUP,
    FloatScales,
    MxFloat8ToFloats,
    RowPairsToFloats,
    SmoothedToFloats,
)

FLOAT8, BYTES = "F8_E4M3", "U8"
TILED = {"F32": "F8_E4M3", "BF16": "F8_E4M3_BF16"}  # format by the type of the scales; others become float32
TILE = 128  # rows and columns that share a scale
ENDINGS = ("_packed", "_blocks")  # of codes


class ScaledTensors:
    """Matrices of float8 and of 4-bit numbers in bytes, among the tensors of a checkpoint."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._tensors = parts, parts.tensors

    def matrices(self) -> Iterator[TensorInfo]:
        """Yield every scaled matrix, refused if parts are missing or do not fit."""
        infos = list(self._tensors.values())
        for info in infos:
            if info.format == BYTES and self._is_codes(info.name):
                yield self._parts.matrix(info, whole(info.name), self._formed)
        for info in infos:
            if info.format == FLOAT8 and info.name not in self._parts.used:
                yield self._parts.matrix(info, info.name, self._formed)

    def _is_codes(self, name: str) -> bool:
        """Return whether a tensor of bytes holds the codes of a matrix."""
        if name.endswith("_blocks"):
            return f"{whole(name)}_scales" in self._tensors
        return name.endswith(("_packed", ".weight")) or self._scale_name(name) in self._tensors

    def _formed(self, codes: TensorInfo) -> TensorInfo:
        """Return the matrix of these codes, its inputs' factors within its columns."""
        if codes.format == FLOAT8:
            matrix = self._float8(codes)
        else:
            matrix = self._blocks(codes) if codes.name.endswith("_blocks") else self._four_bits(codes)
        module, cols = matrix.name.removesuffix(".weight"), matrix.shape[-1]
        if (added := f"{module}.svdquant_lora_a") in self._tensors:
            raise MisfitError(
                f"offmoe does not implement the product of {quote(added)}, which is added to the matrix's"
            )
        name = self._parts.first(f"{module}.pre_quant_scale", f"{module}_pre_quant_scale")
        if name not in self._tensors:
            return matrix
        stack = matrix.shape[:-2]
        factors = self._parts.find(name, tuple(FLOATS), (cols,), (1, cols), (*stack, cols), (*stack, 1, cols))
        scales = (each(factors, prod(stack) * cols), *matrix.scales)
        return replace(matrix, format="F32", scales=scales, row_major=SmoothedToFloats(matrix, factors.format))

    def _scale_name(self, name: str, ending: str = "") -> str:
        """Return the name of a matrix's scales."""
        return self._parts.first(f"{name}_scale{ending}", f"{name}_weight_scale{ending}")

    def _four_bits(self, codes: TensorInfo) -> TensorInfo:
        """Return the matrix of 4-bit numbers whose codes are `codes`."""
        name = whole(codes.name)
        second, divisor = self._scale_name(name, "_2"), self._parts.first(f"{name}_global_scale")
        scale = self._tensors.get(self._scale_name(name))
        if second in self._tensors:
            return self._nvfp4(codes, name, second)
        if divisor in self._tensors:
            return self._nvfp4(codes, name, divisor, inverse=True)
        if scale and scale.format in FLOATS:
            return self._row_pairs(codes, name)
        if scale is None or scale.format == FLOAT8:
            return self._nvfp4(codes, name, second)  # which says what is missing
        stack, (rows, half) = codes.shape[:-2], shape_of(codes, 2, MX_GROUP)
        scales = self._parts.find(scale.name, EXPONENTS, (*stack, rows, 2 * half // MX_GROUP))
        return TensorInfo(name, "MXFP4_PAIRS", (*stack, rows, 2 * half), codes.range, (scales.range,))

    def _blocks(self, blocks: TensorInfo) -> TensorInfo:
        """Return gpt-oss's MXFP4 stack [E, R, 32 G] of codes [E, R, G, 16] and scales [E, R, G]."""
        name = whole(blocks.name)
        scales = self._parts.find(f"{name}_scales", EXPONENTS, blocks.shape[:-1])
        shape = (*scales.shape[:-1], MX_GROUP * scales.shape[-1])
        if blocks.shape[-1] != MX_GROUP // 2 or len(shape) != 3:
            raise misfit(blocks.name, blocks, (BYTES,), "[experts, rows, groups, 16]")
        return TensorInfo(name, "MXFP4_PAIRS", shape, blocks.range, (scales.range,))

    def _nvfp4(self, codes: TensorInfo, name: str, tensor_scale: str, inverse: bool = False) -> TensorInfo:
        """Return an NVFP4 matrix, or a stack of them.

        An inverse scale is inverted once, as in vLLM: dividing each block's scale, as compressed-tensors does, may
        differ in the last bit of float32, and makes the kernels spill registers.
        """
        stack, scale_name = codes.shape[:-2], self._scale_name(name)
        small = self._tensors.get(scale_name)
        by_columns = (
            bool(stack) and small is not None and small.shape == (*stack, codes.shape[-2] // 8, codes.shape[-1])
        )
        if by_columns:
            half, rows = codes.shape[-2:]
        else:
            rows, half = shape_of(codes, 2, MX_GROUP)
        wanted = (*stack, half // 8, rows) if by_columns else (*stack, rows, half // 8)
        block_scales = self._parts.find(scale_name, (FLOAT8,), wanted)
        scale = self._parts.find(tensor_scale, tuple(FLOATS), *one_for_each(stack))
        columns = ((half // 8, rows), (half, rows)) if by_columns else ()
        converter = FloatScales(1, scale.format, rows, inverse, columns)
        scales = (each(scale, prod(stack)), block_scales.range)
        return TensorInfo(name, "NVFP4", (*stack, rows, 2 * half), codes.range, scales, converter)

    def _row_pairs(self, codes: TensorInfo, name: str) -> TensorInfo:
        """Return a matrix of Model Optimizer's 4-bit integers, in float32."""
        stack, (half, cols) = codes.shape[:-2], shape_of(codes, 1, 1)
        scales = self._tensors[self._scale_name(name)]
        groups = scales.shape[-1] if scales.shape else 0
        if scales.shape != (*stack, 2 * half, groups) or not groups or cols % groups:
            raise misfit(scales.name, scales, tuple(FLOATS), f"{[*stack, 2 * half]} and a number of groups of columns")
        self._parts.used.add(scales.name)
        converter = RowPairsToFloats(2 * half, cols, cols // groups, scales.format)
        return TensorInfo(name, "F32", (*stack, 2 * half, cols), codes.range, (scales.range,), converter)

    def _float8(self, codes: TensorInfo) -> TensorInfo:
        """Return the float8 matrix, or stack of matrices, whose codes are `codes`."""
        stack, (rows, cols) = codes.shape[:-2], shape_of(codes, 1, 32)
        name = self._scale_name(codes.name)
        name = name if name in self._tensors else self._scale_name(codes.name, "_inv")
        scale, kinds = self._tensors.get(name), (*FLOATS, *EXPONENTS)
        across: Shape = (*stack, -(-rows // TILE), -(-cols // TILE))
        tiles: tuple[Shape, ...] = (across, (*across[:-1], 1, across[-1], 1))
        for_rows: tuple[Shape, ...] = ((*stack, rows, 1), (*stack, rows))
        grouped: Shape = (*stack, rows, cols // MX_GROUP)
        if scale is None or scale.format not in kinds or scale.shape not in (
            *tiles, *for_rows, *one_for_each(stack), *((grouped,) if scale.format in EXPONENTS else ())
        ):  # fmt: skip
            wanted = (
                f"for every {TILE} x {TILE} weights, {list(across)}, for every row, {list(for_rows[0])}, "
                f"or for all, {list(one_for_each(stack)[0])}"
            )
            raise misfit(name, scale, kinds, wanted)
        self._parts.used.add(name)
        if (point := f"{codes.name}_zero_point") in self._tensors:
            raise MisfitError(f"it has {quote(point)}, and offmoe implements symmetric float8")
        info = replace(codes, scales=(scale.range,), refusal="")
        if scale.shape in tiles and cols % TILE == 0 and not (stack and rows % TILE):
            fmt, count = TILED.get(scale.format), prod(across[-2:])
            return replace(
                info, format=fmt or TILED["F32"], row_major=None if fmt else FloatScales(count, scale.format)
            )
        if scale.shape == grouped and scale.format in EXPONENTS:
            return replace(info, format="BF16", row_major=MxFloat8ToFloats(rows, cols))
        if scale.shape in for_rows:
            return replace(
                info, format="F8_E4M3_ROW", row_major=None if scale.format == "F32" else FloatScales(rows, scale.format)
            )
        if scale.shape not in one_for_each(stack):
            wanted = f"for {f'{rows} rows and ' if stack else ''}{cols} columns, {TILE} of which share one"
            raise misfit(name, scale, tuple(TILED), wanted)
        scales = (each(scale, prod(stack)),)
        return replace(info, format="F8_E4M3_ROW", scales=scales, row_major=FloatScales(1, scale.format, rows))


def whole(name: str) -> str:
    """Return the name of the matrix whose codes are called `name`."""
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
    name = name.removesuffix(ending)
    return name.removesuffix("_weight") if ending else name


def one_for_each(stack: Shape) -> tuple[Shape, ...]:
    """Return the shapes of a scale for each matrix of a stack, or one for all of them."""
    return ((*stack, 1, 1), (*stack, 1), stack, (1,), ()) if stack else ((), (1,))


def each(info: TensorInfo, elements: int) -> ByteRange:
    """Return the range of a tensor that has `elements` numbers, or else as many as one matrix, for all of a stack."""
    return replace(info.range, shared=prod(info.shape) != elements)


def shape_of(codes: TensorInfo, numbers: int, block: int) -> tuple[int, int]:
    """Return rows and columns of a matrix of codes, or of each in a stack.

    Raises MisfitError unless a row, `numbers` of which are in a byte, has a multiple of `block`.
    """
    if not 2 <= len(codes.shape) <= 3 or codes.shape[-1] * numbers % block or not prod(codes.shape):
        raise misfit(codes.name, codes, (codes.format,), f"[rows, columns], of {block} weights or a multiple")
    return codes.shape[-2], codes.shape[-1]
