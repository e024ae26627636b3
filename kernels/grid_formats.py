"""Dequantisers of IQ1, IQ2 and IQ3, bit-exact against `gguf.quants`: indices into grids, signs, scales of groups.

All take blocks uint8 [..., bytes] of 256 weights and return float32 [..., 256].
"""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.fields import half, reinterpret, split
from offmoe.kernels.grids import grid_weights, sign_factors


def looked_up(grid: str, index: Tensor) -> Tensor:
    """Return the weights, int8 [..., width * k], of indices int32 [..., k]."""
    return entries(grid_weights(grid, index.device), index)


def signed(weights: Tensor, signs: Tensor, count: int) -> Tensor:
    """Apply patterns of signs [..., k], of which there are `count`, to int8 [..., 8 * k]."""
    return weights.mul_(entries(sign_factors(count, signs.device), signs))


def entries(table: Tensor, index: Tensor) -> Tensor:
    """Return entries of a table as int8, side by side."""
    return table.index_select(0, index.int().flatten()).view(index.shape).view(torch.int8)


def scaled(weights: Tensor, scale: Tensor) -> Tensor:
    """Multiply int8 [..., 256] by the scales [..., g] of its g equal groups."""
    return split(weights, scale.shape[-1], -1).float().mul_(scale[..., None]).flatten(-2)


def shifted(raw: Tensor, *shifts: int) -> Tensor:
    """Shift every number [..., n] right by each of `shifts`: [..., n, len(shifts)]."""
    return raw[..., None] >> torch.tensor(shifts, dtype=raw.dtype, device=raw.device)


def nibbles_of(raw: Tensor) -> Tensor:
    """Bytes [..., b] → their low and high nibbles in turn [..., 2 * b]."""
    return (shifted(raw, 0, 4) & 15).flatten(-2)


def bits_of(raw: Tensor) -> Tensor:
    """Bytes [..., b] → their bits from the lowest, int32 [..., 8 * b]."""
    return (shifted(raw, *range(8)) & 1).flatten(-2).int()


def seven_bits(words: Tensor) -> Tensor:
    """Four patterns of signs in each int32 [..., n]: [..., 4 * n]."""
    return (shifted(words, 0, 7, 14, 21) & 127).flatten(-2)


def iq2_xxs(blocks: Tensor) -> Tensor:
    """Groups of 32: four indices of 8 bits; a word of four times seven signs and a scale."""
    groups = split(blocks[..., 2:], 8, 8)
    words = reinterpret(groups[..., 4:], torch.int32)[..., 0]
    weights = signed(looked_up("IQ2_XXS", groups[..., :4].flatten(-2)), seven_bits(words), 128)
    return scaled(weights, half(blocks[..., :2]) * (0.5 + (words >> 28 & 15)) * 0.25)


def iq2_xs(blocks: Tensor) -> Tensor:
    """Groups of 16 with scales of 4 bits: indices of 9 bits below seven signs."""
    codes = reinterpret(blocks[..., 2:66], torch.int16).int() & 0xFFFF
    weights = signed(looked_up("IQ2_XS", codes & 511), codes >> 9, 128)
    return scaled(weights, half(blocks[..., :2]) * (0.5 + nibbles_of(blocks[..., 66:])) * 0.25)


def iq2_s(blocks: Tensor) -> Tensor:
    """Groups of 16 with scales of 4 bits: 8 lower bits of indices, eight signs each, 2 upper bits."""
    upper = (shifted(blocks[..., 66:74], 0, 2, 4, 6) & 3).flatten(-2).int()
    weights = signed(looked_up("IQ2_S", blocks[..., 2:34] | upper << 8), blocks[..., 34:66], 256)
    return scaled(weights, half(blocks[..., :2]) * (0.5 + nibbles_of(blocks[..., 74:])) * 0.25)


def iq3_xxs(blocks: Tensor) -> Tensor:
    """Groups of 32: eight indices of 8 bits; words of four times seven signs and a scale after all of them."""
    words = reinterpret(blocks[..., 66:], torch.int32)
    weights = signed(looked_up("IQ3_XXS", blocks[..., 2:66]), seven_bits(words), 128)
    return scaled(weights, half(blocks[..., :2]) * (0.5 + (words >> 28 & 15)) * 0.5)


def iq3_s(blocks: Tensor) -> Tensor:
    """Groups of 32 with scales of 4 bits: 8 lower bits of indices, 1 upper bit, eight signs for two of them."""
    index = blocks[..., 2:66] | bits_of(blocks[..., 66:74]) << 8
    weights = signed(looked_up("IQ3_S", index), blocks[..., 74:106], 256)
    return scaled(weights, half(blocks[..., :2]) * (1 + 2 * nibbles_of(blocks[..., 106:])))


def iq1_s(blocks: Tensor) -> Tensor:
    """Groups of 32: 8 lower bits of indices; four times 3 upper bits, a scale, and whether an eighth is subtracted."""
    heads = reinterpret(blocks[..., 34:], torch.int16).int()
    upper = (shifted(heads, 0, 3, 6, 9) & 7).flatten(-2)
    weights = split(looked_up("IQ1", blocks[..., 2:34] | upper << 8), 8, 32).float()
    scale = half(blocks[..., :2]) * (2 * (heads >> 12 & 7) + 1)
    return weights.add_(eighth(heads < 0)[..., None]).mul_(scale[..., None]).flatten(-2)


def iq1_m(blocks: Tensor) -> Tensor:
    """Groups of 16: 8 lower bits of indices; 3 upper bits and a sign of the eighth; scales of 3 bits in four numbers,
    whose upper nibbles are the block's float16."""
    heads, small = nibbles_of(blocks[..., 32:48]).int(), reinterpret(blocks[..., 48:], torch.int16).int() & 0xFFFF
    weights = split(looked_up("IQ1", blocks[..., :32] | (heads & 7) << 8), 32, 8).float()
    places = torch.arange(0, 16, 4, dtype=torch.int32, device=blocks.device)
    scale = ((small >> 12) << places).sum(-1, keepdim=True).to(torch.int16).view(torch.float16).float()
    scale = scale * (2 * (shifted(small, 0, 3, 6, 9) & 7).flatten(-2) + 1)
    weights.add_(eighth(heads > 7)[..., None])
    return split(weights.flatten(-2), 16, 16).mul_(scale[..., None]).flatten(-2)


def eighth(negative: Tensor) -> Tensor:
    return 0.125 - 0.25 * negative
