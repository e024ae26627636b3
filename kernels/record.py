"""Record of one routed expert: its projections one after another, in the file's layout."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from offmoe.kernels.formats import FORMATS, dequantise


@dataclass(frozen=True)
class Part:
    """One matrix of a record: [rows, cols] in `format`, at byte `offset`."""

    name: str  # gate, up, down; gate_up where the file stacks the two
    format: str
    rows: int
    cols: int
    offset: int

    @property
    def nbytes(self) -> int:
        return FORMATS[self.format].nbytes(self.rows, self.cols)


@dataclass(frozen=True)
class RecordLayout:
    """Parts of a record: gate and up [F, H] (or gate_up [2F, H]), then down [H, F]."""

    parts: tuple[Part, ...]
    interleaved: bool = False  # of gate_up: the rows of gate and up take turns

    @classmethod
    def of(cls, *parts: tuple[str, str, int, int], interleaved: bool = False) -> RecordLayout:
        """Create a layout from (name, format, rows, cols) in the order of the file."""
        laid, offset = [], 0
        for name, fmt, rows, cols in parts:
            laid.append(Part(name, fmt, rows, cols, offset))
            offset += laid[-1].nbytes
        return cls(tuple(laid), interleaved)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def hidden(self) -> int:
        return self.parts[-1].rows

    @property
    def expert_hidden(self) -> int:
        return self.parts[-1].cols


def unpack(raw: Tensor, layout: RecordLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Dequantise records [n, ≥ nbytes] uint8: concatenated gate and up [n, 2F, H], and down [n, H, F], views of one
    tensor.
    """
    runs = []
    for (fmt, _), parts in groupby(layout.parts, key=together):
        run = list(parts)
        end = run[-1].offset + run[-1].nbytes
        rows, cols = 1, sum(part.rows * part.cols for part in run)
        if FORMATS[fmt].scales:
            rows, cols = run[0].rows, run[0].cols
        runs.append(dequantise(raw[:, run[0].offset : end], fmt, rows, cols, dtype).flatten(1))
    flat = runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)
    hidden, inner = layout.hidden, layout.expert_hidden
    gate_up, down = flat.split((2 * inner * hidden, hidden * inner), dim=1)
    gate_up, down = gate_up.unflatten(1, (-1, hidden)), down.unflatten(1, (hidden, inner))
    if layout.interleaved:
        gate_up = torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), dim=1)
    return gate_up, down


def together(part: Part) -> tuple[str, int]:
    """Key of parts that are unpacked in one call: neighbours of one format, whose blocks are contiguous."""
    form = FORMATS[part.format]
    return part.format, part.offset if form.apart or form.scales else 0
