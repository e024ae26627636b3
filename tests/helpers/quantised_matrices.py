"""Quantised matrices for tests of kernels: random ones, extreme ones, and slots full of NaN around them."""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.formats import FORMATS, taken_apart
from offmoe.kernels.planes import PLANES, SlotLayout, rearrange
from offmoe.kernels.record import RecordLayout

# Where a block's scales of 2 bytes lie.
SCALES = {name: (0,) for name in FORMATS if name.startswith("INT4")}
SCALES |= {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q6_K": (208,)}
SCALES |= {"IQ4_NL": (0,), "IQ4_XS": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,)}
SCALES |= dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,))
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of 4-bit groups each size, type of scale, zero points and none, but not all together: a kernel takes seconds.
TESTED = [name for name in PLANES if not name.startswith("INT4")]
TESTED += ["INT4_32_BF16", "INT4_64_F16", "INT4_128_F16_ZEROS"]
EXTREMES = ("zero", "subnormal", "ones")


def random_matrix(fmt: str, rows: int, cols: int, n: int = 1, kind: str = "normal", seed: int = 0) -> Tensor:
    """As it lies in the file, uint8 [n, bytes]: all codes occur, scales are of one magnitude.

    kind "zero": scales are 0; "subnormal": subnormal float16 (float32 for MXFP4); "ones": every code has all its bits.
    """
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (n, FORMATS[fmt].nbytes(rows, cols)), dtype=torch.uint8, generator=g)
    if kind == "ones":
        raw.fill_(0xFF)
    if fmt in FLOATS:
        sizes = {"normal": 1.0, "zero": 0.0, "subnormal": 1e-6, "ones": 1e4}
        values = torch.randn((n, rows * cols), generator=g) * sizes[kind]
        return values.to(FLOATS[fmt]).view(torch.uint8)
    if FORMATS[fmt].scales:
        return with_scales(raw, fmt, rows, cols, kind, g)
    blocks = raw.view(n, -1, FORMATS[fmt].bytes)
    many = blocks.shape[1]
    if fmt.startswith("MXFP4"):
        low, high = {"normal": (118, 128), "zero": (0, 1), "subnormal": (0, 3), "ones": (200, 210)}[kind]
        blocks[..., 0] = torch.randint(low, high, (n, many), dtype=torch.uint8, generator=g)
        if kind == "zero":  # a scale is never 0, a code may be
            blocks[..., 1:] = torch.tensor([0x00, 0x88, 0x80, 0x08], dtype=torch.uint8).repeat(4)
    for at in SCALES.get(fmt, ()):
        scale = torch.rand((n, many, 1), generator=g) * 0.1 + 0.01
        scale *= {"normal": 1.0, "zero": 0.0, "subnormal": 5e-4, "ones": 1.0}[kind]
        if FORMATS[fmt].block == 256 and fmt.startswith("IQ") and kind != "subnormal":
            scale /= 32  # its groups' scales are whole numbers of two digits
        blocks[..., at : at + 2] = scale.to(torch.bfloat16 if "BF16" in fmt else torch.half).view(torch.uint8)
    if fmt == "IQ1_M":
        into_nibbles(
            blocks, (torch.rand((n, many), generator=g) * 0.1 + 0.01) / 8 * {"zero": 0, "subnormal": 4e-3}.get(kind, 1)
        )
    if fmt.endswith("_ZEROS"):
        blocks[..., 2:4] &= torch.tensor([0 if kind == "ones" else 0x0F, 0])  # if 15, codes of 15 were 0
    return taken_apart(blocks, FORMATS[fmt]) if FORMATS[fmt].apart else raw


def into_nibbles(blocks: Tensor, scale: Tensor) -> None:
    """Write the float16 scale of IQ1_M's blocks into the upper nibbles of its last four 16-bit numbers."""
    bits = scale.half().view(torch.int16).int()
    for i in range(4):
        blocks[..., 49 + 2 * i] = (blocks[..., 49 + 2 * i] & 15) | (bits >> 4 * i & 15).to(torch.uint8) << 4


def with_scales(raw: Tensor, fmt: str, rows: int, cols: int, kind: str, g: torch.Generator) -> Tensor:
    """float8 and NVFP4: no e4m3 is NaN; "subnormal": they are, and scales of float32 nearly."""
    scales = FORMATS[fmt].scales
    assert scales
    start = FORMATS[fmt].scales_nbytes(rows, cols)
    eights = start + (rows * cols // 16 if fmt == "NVFP4" else rows * cols)
    codes = raw[:, start:eights]
    if kind == "subnormal":
        codes &= 0x87
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    values = torch.rand((len(raw), start // scales.dtype.itemsize), generator=g) * 0.02 + 0.002
    values *= {"normal": 1.0, "zero": 0.0, "subnormal": 1e-30, "ones": 1.0}[kind]
    raw[:, :start] = values.to(scales.dtype).view(torch.uint8)
    return raw


def random_records(layout: RecordLayout, n: int, kind: str = "normal", seed: int = 0) -> Tensor:
    """uint8 [n, record bytes]."""
    parts = [random_matrix(p.format, p.rows, p.cols, n, kind, seed + i) for i, p in enumerate(layout.parts)]
    return torch.cat(parts, dim=1)


def filled_slots(raw: Tensor, layout: SlotLayout, where: list[int], count: int) -> Tensor:
    """`count` slots of a 256-byte stride, 0xFF but for the records `raw` at `where`."""
    slots = torch.full((count, -(-layout.nbytes // 256) * 256), 0xFF, dtype=torch.uint8)
    slots[where, : layout.nbytes] = rearrange(raw, layout)
    return slots
