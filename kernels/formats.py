"""Weight formats of model files, and naive dequantisers, bit-exact against `gguf.quants`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from offmoe.kernels.fields import BITS, CRUMBS, NIBBLES, fields, half, nibbles, pairs, reinterpret, split
from offmoe.kernels.grid_formats import iq1_m, iq1_s, iq2_s, iq2_xs, iq2_xxs, iq3_s, iq3_xxs


@dataclass(frozen=True)
class Scales:
    """Scales that precede all blocks of a matrix, row by row, each for `rows` × `cols` weights."""

    rows: int
    cols: int  # 0: all of a row
    dtype: torch.dtype = torch.float32

    def count(self, rows: int, cols: int) -> tuple[int, int]:
        """Return the number of tiles of a [rows, cols] matrix, down and across."""
        return -(-rows // self.rows), -(-cols // self.cols) if self.cols else 1


@dataclass(frozen=True)
class Format:
    """A block of `block` weights takes `bytes` bytes; a row is a whole number of blocks."""

    name: str
    block: int
    bytes: int
    gguf_type: int | None  # ggml_type in a GGUF's tensor table
    # uint8 [..., n, bytes] → [..., n, block]; where there are `scales`, the second argument is each block's [..., n, 1]
    unpack: Callable[..., Tensor] = field(repr=False, compare=False)
    apart: tuple[int, ...] = ()  # a matrix's blocks lie taken apart: the first so many bytes of each, then the next …
    scales: Scales | None = None

    def nbytes(self, rows: int, cols: int) -> int:
        """Return the bytes of a [rows, cols] matrix; ValueError if cols is not a multiple of `block`."""
        if cols % self.block:
            raise ValueError(f"a row of {cols} weights is no whole number of {self.name} blocks of {self.block}")
        return rows * (cols // self.block) * self.bytes + self.scales_nbytes(rows, cols)

    def scales_nbytes(self, rows: int, cols: int) -> int:
        """Return the bytes of the scales that precede the blocks."""
        return self.scales.dtype.itemsize * math.prod(self.scales.count(rows, cols)) if self.scales else 0

    def lines(self, cols: int) -> tuple[int, ...]:
        """Bytes of a row of `cols` weights in each of the pieces that a matrix is taken apart into."""
        scales = (self.scales_nbytes(1, cols),) if self.scales else ()
        return (*scales, *(cols // self.block * size for size in self.apart or (self.bytes,)))

    @property
    def tiled(self) -> bool:
        """Whether rows share scales, so that a row cannot be moved alone."""
        return self.scales is not None and self.scales.rows > 1


def dequantise(raw: Tensor, fmt: str | Format, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [..., rows * row bytes] → `dtype` [..., rows, cols]; batch dimensions may be strided.

    Values are those of float32 arithmetic, rounded once to `dtype`. The bytes may start anywhere.
    An aligned F32, F16 or BF16 source that already has `dtype` is returned as a view, not copied.
    """
    form = FORMATS[fmt] if isinstance(fmt, str) else fmt
    if raw.shape[-1] != form.nbytes(rows, cols):
        raise ValueError(f"{form.name} [{rows}, {cols}] is {form.nbytes(rows, cols)} bytes, got {raw.shape[-1]}")
    start = form.scales_nbytes(rows, cols)
    rest = raw[..., start:]
    blocks = together(rest, form) if form.apart else split(rest, rows * cols // form.block, form.bytes)
    scales = (scales_of(raw[..., :start], form, form.scales, rows, cols),) if form.scales else ()
    return form.unpack(blocks, *scales).to(dtype).reshape(*raw.shape[:-1], rows, cols)


def scales_of(raw: Tensor, form: Format, scales: Scales, rows: int, cols: int) -> Tensor:
    """Bytes [..., n] → each block's scale, float32 [..., blocks, 1]; a block lies within one."""
    values = reinterpret(raw, scales.dtype).float().unflatten(-1, scales.count(rows, cols))
    values = values.repeat_interleave((scales.cols or cols) // form.block, -1)
    return values.repeat_interleave(scales.rows, -2)[..., :rows, :].flatten(-2)[..., None]


def together(raw: Tensor, form: Format) -> Tensor:
    """Join planes [..., n * form.bytes] of a format that stores them apart into blocks [..., n, form.bytes]."""
    n = raw.shape[-1] // form.bytes
    planes = raw.split([n * size for size in form.apart], -1)
    return torch.cat([plane.unflatten(-1, (n, -1)) for plane in planes], -1)


def taken_apart(blocks: Tensor, form: Format) -> Tensor:
    """Split blocks into planes, the inverse of `together`."""
    return torch.cat([plane.flatten(-2) for plane in blocks.split(form.apart, -1)], -1)


def whole_rows(raw: Tensor, form: Format, rows: int) -> Tensor:
    """Rearrange a matrix from the file's layout to [rows, row bytes], so that rows can be moved."""
    start = rows * form.scales.dtype.itemsize if form.scales else 0
    blocks = (together(raw[start:], form) if form.apart else raw[start:]).view(rows, -1)
    return torch.cat((raw[:start].view(rows, -1), blocks), 1) if start else blocks


def as_it_lies(rows: Tensor, form: Format) -> Tensor:
    """Rearrange rows to the file's layout [bytes], the inverse of `whole_rows`."""
    start = form.scales.dtype.itemsize if form.scales else 0
    scales, blocks = rows[:, :start].flatten(), rows[:, start:]
    planes = taken_apart(blocks.reshape(-1, form.bytes), form) if form.apart else blocks.flatten()
    return torch.cat((scales, planes)) if start else planes


def f32(blocks: Tensor) -> Tensor:
    return reinterpret(blocks, torch.float32)


def f16(blocks: Tensor) -> Tensor:
    return reinterpret(blocks, torch.float16)


def bf16(blocks: Tensor) -> Tensor:
    return reinterpret(blocks, torch.bfloat16)


def q8_0(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].view(torch.int8).float().mul_(half(blocks[..., :2]))


def q4_0(blocks: Tensor) -> Tensor:
    return nibbles(blocks[..., 2:]).sub_(8).float().mul_(half(blocks[..., :2]))


def q4_1(blocks: Tensor) -> Tensor:
    return nibbles(blocks[..., 4:]).float().mul_(half(blocks[..., :2])).add_(half(blocks[..., 2:4]))


def five_bits(high: Tensor, raw: Tensor) -> Tensor:
    """Q5_0 and Q5_1: codes int8 [..., 32] of their fifth bits [..., 4] and nibbles [..., 16]."""
    bit = torch.arange(8, dtype=torch.uint8, device=raw.device)
    return nibbles(raw).add_((high[..., None] >> bit & 1).flatten(-2).view(torch.int8), alpha=16)


def q5_0(blocks: Tensor) -> Tensor:
    return five_bits(blocks[..., 2:6], blocks[..., 6:]).sub_(16).float().mul_(half(blocks[..., :2]))


def q5_1(blocks: Tensor) -> Tensor:
    weights = five_bits(blocks[..., 4:8], blocks[..., 8:]).float()
    return weights.mul_(half(blocks[..., :2])).add_(half(blocks[..., 2:4]))


def crumbs(raw: Tensor) -> Tensor:
    """Q2_K and Q3_K: bytes [..., 64] → int8 [..., 8, 32], four times two bits of 32 bytes."""
    return fields(split(raw, 2, 32), CRUMBS, 0, 2, 4, 6).flatten(-3, -2)


def q2_k(blocks: Tensor) -> Tensor:
    """Groups of 16, whose scales and minima are the low and the high nibbles of 16 bytes."""
    scales = blocks[..., :16]
    scale, minimum = half(blocks[..., 80:82]) * (scales & 15), half(blocks[..., 82:]) * (scales >> 4)
    weights = split(crumbs(blocks[..., 16:80]).flatten(-2), 16, 16)
    return weights.float().mul_(scale[..., None]).sub_(minimum[..., None]).flatten(-2)


def q3_k(blocks: Tensor) -> Tensor:
    """Groups of 16, whose scales have 4 bits in 8 bytes, the low nibbles first, and 2 in 4, less 32."""
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    low, high = torch.cat([low & 15, low >> 4], -1), torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    scale = half(blocks[..., 108:]) * (low | high << 4).view(torch.int8).sub_(32)
    weights = crumbs(blocks[..., 32:96]).add_(fields(blocks[..., :32], BITS, *range(8)), alpha=4).sub_(4)
    return split(weights.flatten(-2), 16, 16).float().mul_(scale[..., None]).flatten(-2)


def k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K: scales and minima [..., 8, 1] of the 32-weight groups, 6 bits each in 12 bytes.

    Bytes 0–3 hold scales 0–3 (their top bits: those of scales 4–7), bytes 4–7 the same for the minima,
    bytes 8–11 the low nibbles of scales 4–7 and of minima 4–7.
    """
    low, mins, rest = split(blocks[..., 4:16], 3, 4).unbind(-2)
    scale = torch.cat([low & 63, rest & 15 | low >> 2 & 48], -1)
    minimum = torch.cat([mins & 63, rest >> 4 | mins >> 2 & 48], -1)
    return (half(blocks[..., :2]) * scale)[..., None], (half(blocks[..., 2:4]) * minimum)[..., None]


def k_nibbles(raw: Tensor) -> Tensor:
    """Q4_K and Q5_K: bytes [..., 128] → int8 [..., 8, 32], low and high nibbles of 32 bytes in turn."""
    return fields(split(raw, 4, 32), NIBBLES, 0, 4).flatten(-3, -2)


def q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = k_scales(blocks)
    return k_nibbles(blocks[..., 16:]).float().mul_(scale).sub_(minimum).flatten(-2)


def q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = k_scales(blocks)
    high = fields(blocks[..., 16:48], BITS, *range(8))
    weights = k_nibbles(blocks[..., 48:]).add_(high, alpha=16)
    return weights.float().mul_(scale).sub_(minimum).flatten(-2)


def q6_k(blocks: Tensor) -> Tensor:
    low = nibbles(split(blocks[..., :128], 2, 64))
    high = fields(split(blocks[..., 128:192], 2, 32), CRUMBS, 0, 2, 4, 6).flatten(-2)
    scale = blocks[..., 192:208].view(torch.int8) * half(blocks[..., 208:])
    weights = low.add_(high, alpha=16).sub_(32)
    return split(weights.flatten(-2), 16, 16).float().mul_(scale[..., None]).flatten(-2)


def mxfp4(blocks: Tensor) -> Tensor:
    return fp4(blocks[..., :1].int(), nibbles(blocks[..., 1:]))


def mxfp4_pairs(blocks: Tensor) -> Tensor:
    """The same, as gpt-oss's safetensors have it: a byte holds two neighbours."""
    return fp4(blocks[..., :1].int(), pairs(blocks[..., 1:]))


def fp4(exponent: Tensor, code: Tensor) -> Tensor:
    """FP4 (e2m1) times 2 ** (exponent - 127), held as twice e2m1's values, all whole, and half the scale."""
    scale = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), exponent - 1 << 23)
    ramp = code & 7  # 0 1 2 3 4 5 6 7 → 0 1 2 3 4 6 8 12
    magnitude = ramp.add((ramp - 4).clamp_(min=0)).add_((ramp - 6).clamp_(min=0), alpha=2)
    sign = 1 - (code >> 2 & 2)
    return magnitude.mul_(sign).float().mul_(scale.view(torch.float32))


def iq4(code: Tensor) -> Tensor:
    """Values of IQ4_NL and IQ4_XS, float32. Indexing by brackets takes four times as long."""
    values = (-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    return torch.tensor(values, device=code.device).index_select(0, code.int().flatten()).view(code.shape)


def iq4_nl(blocks: Tensor) -> Tensor:
    return iq4(nibbles(blocks[..., 2:])).mul_(half(blocks[..., :2]))


def iq4_xs(blocks: Tensor) -> Tensor:
    """Groups of 32 whose scales have 4 bits in bytes 4–7 and 2 in bytes 2 and 3, less 32."""
    place = torch.arange(4, dtype=torch.uint8, device=blocks.device)
    high = (blocks[..., 2:4, None] >> 2 * place & 3).flatten(-2)
    low = (blocks[..., 4:8, None] >> 4 * place[:2] & 15).flatten(-2)
    scale = half(blocks[..., :2]) * (low | high << 4).view(torch.int8).sub_(32)
    return iq4(nibbles(split(blocks[..., 8:], 8, 16))).mul_(scale[..., None]).flatten(-2)


def f8_e4m3(blocks: Tensor, scale: Tensor) -> Tensor:
    return reinterpret(blocks, torch.float8_e4m3fn).float().mul_(scale)


def nvfp4(blocks: Tensor, scale: Tensor) -> Tensor:
    """Twice 16 weights of e2m1, two neighbours in a byte, behind the e4m3 scales of both, which are multiplied with the
    row's first: NVFP4QTensor.dequantize of NVIDIA's Model Optimizer."""
    small = reinterpret(blocks[..., :2], torch.float8_e4m3fn).float().mul_(scale)
    # its bits are an e2m1's sign, and low exponent and high mantissa of a float16: 2^-14 times the value
    codes = pairs(blocks[..., 2:]).to(torch.int16)
    halves = ((codes & 8) << 12 | (codes & 7) << 9).view(torch.float16).float() * 2.0**14
    return split(halves, 2, 16).mul_(small[..., None]).flatten(-2)


def int4(scale: torch.dtype, zeros: bool, blocks: Tensor) -> Tensor:
    """(code - zero) * scale: a group's scale, its zero point (else 8) in the lower of 2 bytes, the codes.

    Products of so few bits are exact in float32, so that `dtype` rounds as arithmetic in the scale's own type does.
    """
    codes = pairs(blocks[..., 4 if zeros else 2 :]).sub_(blocks[..., 2:3].view(torch.int8) if zeros else 8)
    return codes.float().mul_(reinterpret(blocks[..., :2], scale).float())


def int4_groups() -> Iterator[Format]:
    """Yield the formats of compressed-tensors, AWQ and GPTQ (row-major), by group size and type of scale."""
    for group in (32, 64, 128):
        for kind, scale in (("F16", torch.float16), ("BF16", torch.bfloat16)):
            for zeros in (False, True):
                name, planes = f"INT4_{group}_{kind}" + "_ZEROS" * zeros, (4 if zeros else 2, group // 2)
                yield Format(name, group, sum(planes), None, partial(int4, scale, zeros), planes)


FORMATS = {
    form.name: form
    for form in (
        Format("F32", 1, 4, 0, f32),
        Format("F16", 1, 2, 1, f16),
        Format("BF16", 1, 2, 30, bf16),
        Format("Q8_0", 32, 34, 8, q8_0),
        Format("Q4_0", 32, 18, 2, q4_0),
        Format("Q4_1", 32, 20, 3, q4_1),
        Format("Q5_0", 32, 22, 6, q5_0),
        Format("Q5_1", 32, 24, 7, q5_1),
        Format("Q2_K", 256, 84, 10, q2_k),
        Format("Q3_K", 256, 110, 11, q3_k),
        Format("Q4_K", 256, 144, 12, q4_k),
        Format("Q5_K", 256, 176, 13, q5_k),
        Format("Q6_K", 256, 210, 14, q6_k),
        Format("IQ1_S", 256, 50, 19, iq1_s),
        Format("IQ1_M", 256, 56, 29, iq1_m),
        Format("IQ2_XXS", 256, 66, 16, iq2_xxs),
        Format("IQ2_XS", 256, 74, 17, iq2_xs),
        Format("IQ2_S", 256, 82, 22, iq2_s),
        Format("IQ3_XXS", 256, 98, 18, iq3_xxs),
        Format("IQ3_S", 256, 110, 21, iq3_s),
        Format("IQ4_NL", 32, 18, 20, iq4_nl),
        Format("IQ4_XS", 256, 136, 23, iq4_xs),
        Format("MXFP4", 32, 17, 39, mxfp4),
        Format("MXFP4_PAIRS", 32, 17, None, mxfp4_pairs, apart=(1, 16)),
        Format("F8_E4M3", 128, 128, None, f8_e4m3, scales=Scales(128, 128)),  # quant_method fp8: of DeepSeek-V3 …
        Format("F8_E4M3_BF16", 128, 128, None, f8_e4m3, scales=Scales(128, 128, torch.bfloat16)),  # … and of Qwen3
        Format("F8_E4M3_ROW", 32, 32, None, f8_e4m3, scales=Scales(1, 0)),
        Format("NVFP4", 32, 18, None, nvfp4, apart=(2, 16), scales=Scales(1, 0)),
        *int4_groups(),
    )
}
GGML = {name: form for name, form in FORMATS.items() if form.gguf_type is not None}  # what a GGUF may hold
