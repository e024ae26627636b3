"""Embedding lookup in a quantised matrix: the residual stream at the start of a step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.formats.bits import iq4
from offmoe.kernels.gpu.formats.grids import grids_for, has_grid
from offmoe.kernels.gpu.formats.tile_grids import tile_grid
from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.gpu.striped import striped_index
from offmoe.kernels.planes import Matrix

COLUMNS = 512  # a program's; loads are byte by byte, which is nothing for one row


@triton.jit
def byte(buffer, at, mask):
    """Load the byte at `at` as int32."""
    return tl.load(buffer + at, mask=mask, other=0).to(tl.int32)


@triton.jit
def half(buffer, at, mask):
    """Load the float16 at the even byte `at` as float32."""
    return tl.load((buffer + at).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def signed(x):
    """Return a byte as an integer -128 … 127."""
    return tl.where(x > 127, x - 256, x)


@triton.jit
def whole(buffer, p0, n, mask, FORMAT: tl.constexpr):
    """Load the n-th value of a float format."""
    if FORMAT == "F32":
        x = tl.load((buffer + p0 + n * 4).to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)
    elif FORMAT == "F16":
        x = half(buffer, p0 + n * 2, mask)
    else:  # by its bits: the interpreter has bfloat16 wrong
        bits = tl.load((buffer + p0 + n * 2).to(tl.pointer_type(tl.uint16)), mask=mask, other=0)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def small(buffer, p0, p1, p2, p3, b, i, mask, FORMAT: tl.constexpr):
    """Return value i of block b of 32 weights, as kernels.formats does."""
    if FORMAT == "Q8_0":
        x = signed(byte(buffer, p1 + b * 32 + i, mask)).to(tl.float32) * half(buffer, p0 + b * 2, mask)
    elif FORMAT == "Q4_0":
        code = byte(buffer, p1 + b * 16 + i % 16, mask) >> (i // 16 * 4) & 15
        x = (code - 8).to(tl.float32) * half(buffer, p0 + b * 2, mask)
    elif FORMAT == "Q4_1":
        code = byte(buffer, p2 + b * 16 + i % 16, mask) >> (i // 16 * 4) & 15
        x = code.to(tl.float32) * half(buffer, p0 + b * 2, mask) + half(buffer, p1 + b * 2, mask)
    elif FORMAT == "Q5_0":
        code = byte(buffer, p2 + b * 16 + i % 16, mask) >> (i // 16 * 4) & 15
        high = byte(buffer, p1 + b * 4 + i // 8, mask) >> (i % 8) & 1
        x = (code + high * 16 - 16).to(tl.float32) * half(buffer, p0 + b * 2, mask)
    elif FORMAT == "Q5_1":
        code = byte(buffer, p3 + b * 16 + i % 16, mask) >> (i // 16 * 4) & 15
        high = byte(buffer, p2 + b * 4 + i // 8, mask) >> (i % 8) & 1
        x = (code + high * 16).to(tl.float32) * half(buffer, p0 + b * 2, mask) + half(buffer, p1 + b * 2, mask)
    elif FORMAT == "IQ4_NL":
        code = byte(buffer, p1 + b * 16 + i % 16, mask) >> (i // 16 * 4) & 15
        x = (iq4(code.to(tl.uint32)) & 0xFF).to(tl.float32) - 128.0
        x *= half(buffer, p0 + b * 2, mask)
    else:
        if FORMAT == "MXFP4":
            code = byte(buffer, p1 + b * 16 + i % 16, mask) >> (i // 16 * 4) & 15
        else:  # MXFP4_PAIRS
            code = byte(buffer, p1 + b * 16 + i // 2, mask) >> (i % 2 * 4) & 15
        ramp = code & 7
        size = ramp + tl.maximum(ramp - 4, 0) + 2 * tl.maximum(ramp - 6, 0)
        exponent = byte(buffer, p0 + b, mask)
        scale = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23)
        x = (size * (1 - (code >> 2 & 2))).to(tl.float32) * scale.to(tl.float32, bitcast=True)
    return x


@triton.jit
def large(buffer, p0, p1, p2, p3, b, i, mask, FORMAT: tl.constexpr):
    """Return value i of block b of 256 weights, as kernels.formats does."""
    if FORMAT == "Q6_K":
        part, r = i // 128, i % 128
        code = byte(buffer, p0 + b * 128 + part * 64 + r % 64, mask) >> (r // 64 * 4) & 15
        high = byte(buffer, p1 + b * 64 + part * 32 + r % 32, mask) >> (r // 32 * 2) & 3
        scale = signed(byte(buffer, p2 + b * 16 + i // 16, mask)).to(tl.float32) * half(buffer, p3 + b * 2, mask)
        x = (code + high * 16 - 32).to(tl.float32) * scale
    elif FORMAT == "Q2_K":
        code = byte(buffer, p1 + b * 64 + i // 128 * 32 + i % 32, mask) >> (i % 128 // 32 * 2) & 3
        both, at = byte(buffer, p0 + b * 16 + i // 16, mask), p2 + b * 4
        scale, minimum = (both & 15).to(tl.float32), (both >> 4).to(tl.float32)
        x = code.to(tl.float32) * (half(buffer, at, mask) * scale) - half(buffer, at + 2, mask) * minimum
    elif FORMAT == "Q3_K":
        code = byte(buffer, p1 + b * 64 + i // 128 * 32 + i % 32, mask) >> (i % 128 // 32 * 2) & 3
        code += (byte(buffer, p0 + b * 32 + i % 32, mask) >> (i // 32) & 1) * 4 - 4
        at, group = p2 + b * 12, i // 16
        scale = byte(buffer, at + group % 8, mask) >> (group // 8 * 4) & 15
        scale += (byte(buffer, at + 8 + group % 4, mask) >> (group // 4 * 2) & 3) * 16 - 32
        x = code.to(tl.float32) * (half(buffer, p3 + b * 2, mask) * scale.to(tl.float32))
    elif FORMAT == "IQ4_XS":
        at, group = p0 + b * 8, i // 32
        code = byte(buffer, p1 + b * 128 + group * 16 + i % 16, mask) >> (i % 32 // 16 * 4) & 15
        scale = byte(buffer, at + 4 + group // 2, mask) >> (group % 2 * 4) & 15
        scale += (byte(buffer, at + 2 + group // 4, mask) >> (group % 4 * 2) & 3) * 16 - 32
        x = (iq4(code.to(tl.uint32)) & 0xFF).to(tl.float32) - 128.0
        x *= half(buffer, at, mask) * scale.to(tl.float32)
    else:
        SIZE: tl.constexpr = 144 if FORMAT == "Q4_K" else 176
        at, group = p0 + b * SIZE, i // 32
        code = byte(buffer, at + (SIZE - 128) + group // 2 * 32 + i % 32, mask) >> (group % 2 * 4) & 15
        if FORMAT == "Q5_K":
            code += (byte(buffer, at + 16 + i % 32, mask) >> group & 1) * 16
        j = group % 4
        low, least = byte(buffer, at + 4 + j, mask), byte(buffer, at + 8 + j, mask)
        rest = byte(buffer, at + 12 + j, mask)
        first = group < 4
        scale = tl.where(first, low & 63, rest & 15 | low >> 2 & 48).to(tl.float32)
        minimum = tl.where(first, least & 63, rest >> 4 | least >> 2 & 48).to(tl.float32)
        x = code.to(tl.float32) * (half(buffer, at, mask) * scale) - half(buffer, at + 2, mask) * minimum
    return x


@triton.jit
def _embed(
    tokens, buffer, out, scale, grids, p0, p1, p2, p3,
    H: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr,
    STRIPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, columns)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0)
    token = tl.maximum(tl.load(tokens + t).to(tl.int64), 0)  # -1 behind a step that chose none
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = col < H
    b, i = token * (H // BLOCK) + col // BLOCK, col % BLOCK
    if has_grid(FORMAT):  # 64 columns a row of a tile
        step = tl.program_id(1) * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)
        x = tile_grid(buffer, token + step * 0, step < H // 64, step, FORMAT, H, p0, p1, p2, p3, grids)
        x = tl.reshape(x, (COLUMNS,))
    elif BLOCK == 1:
        x = whole(buffer, p0, b, mask, FORMAT)
    elif BLOCK == 32:
        x = small(buffer, p0, p1, p2, p3, b, i, mask, FORMAT)
    else:
        x = large(buffer, p0, p1, p2, p3, b, i, mask, FORMAT)
    spot = striped_index(col, H) if STRIPED else col
    tl.store(out + t.to(tl.int64) * H + spot, x * scale, mask=mask)


def embed(
    tokens: Tensor, matrix: tuple[Tensor, Matrix], out: Tensor, *, striped: bool, scale: float = 1.0, pdl: bool = False
) -> None:
    """Look up ids [T], int32 or int64, in the matrix [V, H] (uint8 in slot layout): out [T, H] float32, times `scale`.

    striped: in the order of kernels.striped.
    """
    buffer, form = matrix
    assert out.is_contiguous()
    assert out.numel() == tokens.numel() * form.cols
    planes = (*form.planes, 0, 0, 0)[:4]
    _embed[(tokens.numel(), triton.cdiv(form.cols, COLUMNS))](
        tokens, buffer, out, scale, grids_for(buffer.device, form.format), *planes,
        H=form.cols, COLUMNS=COLUMNS, BLOCK=FORMATS[form.format].block,
        FORMAT=form.format, STRIPED=striped, num_warps=4, **dependent(pdl),
    )  # fmt: skip
