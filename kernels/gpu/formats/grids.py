"""Grids of IQ1, IQ2 and IQ3 on a GPU, and the words of eight weights that their indices stand for.

A program reads grids through a pointer, all of them 11 KiB: those in use stay in L1. Eight codes are the nibbles of a
word, weights w and w + 4 in byte w, so that a word's low nibbles are four weights and its high nibbles the next four;
signs are spread over nibbles in the same order.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.formats.bits import INTERPRETED, picked
from offmoe.kernels.grids import GRIDS

FORMATS = {"IQ1_S": "IQ1", "IQ1_M": "IQ1", **{name: name for name in GRIDS if name != "IQ1"}}  # and their grids
START = {name: sum(len(GRIDS[before].codes) for before in list(GRIDS)[:at]) for at, name in enumerate(GRIDS)}


@triton.constexpr_function
def has_grid(fmt):
    return fmt in FORMATS


@triton.constexpr_function
def start_of(fmt):
    """Return where a format's grid begins, in entries."""
    return START[FORMATS[fmt]]


def packed(name: str) -> Tensor:
    """Return a grid's entries, an int32 each: codes in nibbles; in bytes weights (IQ3_XXS), or codes plus 8 (IQ3_S)."""
    grid = GRIDS[name]
    codes = grid.codes.long()
    if name == "IQ3_XXS":
        codes = torch.tensor(grid.values)[codes]
    elif name == "IQ3_S":
        codes += 8
    places = torch.tensor([0, 8, 16, 24, 4, 12, 20, 28])[: grid.width]
    return (codes << places).sum(1).to(torch.int32)


@cache
def all_grids(device: torch.device) -> Tensor:
    return torch.cat([packed(name) for name in GRIDS]).to(device)


def grids_for(device: torch.device, *formats: str) -> Tensor | None:
    """Return the kernels' argument `grids`: None if no format has one."""
    return all_grids(device) if FORMATS.keys() & set(formats) else None


@triton.jit
def entry_of(grids, index, FORMAT: tl.constexpr):
    """Load a format's grid entries, uint32.

    The load is inline assembly, since Triton would choose a layout of its own for addresses without an order.
    """
    table = grids + start_of(FORMAT)
    if INTERPRETED:
        return tl.load(table + index.to(tl.int32)).to(tl.uint32, bitcast=True)
    else:
        address = table.to(tl.int64) + index.to(tl.uint64).to(tl.int64) * 4
        return tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [address], dtype=tl.uint32, is_pure=True,
                                         pack=1)  # fmt: skip


@triton.jit
def spread(signs):
    """Move bit w of eight to the lowest of the nibble that has weight w."""
    two = signs | signs << 7
    return (two | two << 14) & 0x11111111


@triton.jit
def spread_even(signs):
    """Spread seven bits and an eighth that makes their number even: the sum of all nibbles, in the highest one."""
    seven = spread(signs)
    return seven | seven * 0x11111111 & 0x10000000


@triton.jit
def two_bits(entry, signs):
    """Return weights of IQ2 plus 64 as bytes, in the order of `dot_8`: ±8, ±25 and ±43 by code and sign."""
    selector = entry | signs << 2
    return picked(selector, 0x406B5948, 0x40152738), picked(selector >> 16, 0x406B5948, 0x40152738)


@triton.jit
def three_bits(entry, following, signs):
    """Return weights of IQ3_XXS plus 128 as bytes: of one entry, and of the following one."""
    low, high = signs & 0x01010101, signs >> 4 & 0x01010101
    return (entry ^ low * 255 ^ 0x80808080) + low, (following ^ high * 255 ^ 0x80808080) + high


@triton.jit
def odd_weights(entry, following, signs):
    """Return nibbles n that stand for the weights 2 n - 15 of IQ3_S: codes plus 8, or 15 less these."""
    return (entry | following << 4) ^ signs * 15
