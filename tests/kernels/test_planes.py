"""Planes and back again; what every plane is promised to be: aligned, apart from the others, within the slot."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from quantised_matrices import random_matrix, random_records

from offmoe.kernels.formats import FORMATS, dequantise
from offmoe.kernels.planes import PLANES, SlotLayout, matrix, rearrange, rearrange_matrix, slot_layout, unplane
from offmoe.kernels.record import RecordLayout, unpack


def layouts(fmt: str, down: str) -> list[RecordLayout]:
    """Split and stacked; 3 or 5 blocks of 32 a row, so that planes end off alignment."""
    h, f = (512, 256) if max(FORMATS[fmt].block, FORMATS[down].block) > 32 else (96, 160)
    return [
        RecordLayout.of(("gate", fmt, f, h), ("up", fmt, f, h), ("down", down, h, f)),
        RecordLayout.of(("gate_up", fmt, 2 * f, h), ("down", down, h, f)),
    ]


def spans(layout: SlotLayout) -> list[tuple[int, int]]:
    """Return the spans of all planes of all runs, ascending."""
    return sorted(
        (at, at + run.blocks * size)
        for run in layout.runs
        for at, size in zip(run.planes, PLANES[run.format], strict=True)
    )


def test_a_block_is_its_runs() -> None:
    assert set(PLANES) == set(FORMATS)
    for name, runs in PLANES.items():
        assert sum(runs) == FORMATS[name].bytes, name


@pytest.mark.parametrize("fmt", PLANES)
@pytest.mark.parametrize("down", ["Q8_0", "Q6_K"])
def test_records_come_back(fmt: str, down: str) -> None:
    for record in layouts(fmt, down):
        layout = slot_layout(record)
        raw = random_records(record, 3)
        slots = rearrange(raw, layout)
        assert slots.shape == (3, layout.nbytes)
        gate_up, want_down = unpack(raw, record, torch.float32)
        got = [dequantise(unplane(slots, m), m.format, m.rows, m.cols) for m in (layout.gate, layout.up, layout.down)]
        assert torch.equal(torch.cat(got[:2], dim=1), gate_up)
        assert torch.equal(got[2], want_down)


@pytest.mark.parametrize("fmt", PLANES)
def test_planes_are_aligned_and_apart(fmt: str) -> None:
    for record in layouts(fmt, "MXFP4"):
        layout = slot_layout(record)
        found = spans(layout)
        assert all(start % 16 == 0 for start, _ in found)
        assert all(end <= start for (_, end), (start, _) in pairwise(found))
        assert found[-1][1] <= layout.nbytes
        assert layout.nbytes % 16 == 0
        assert (layout.hidden, layout.expert_hidden) == (record.hidden, record.expert_hidden)


@pytest.mark.parametrize("fmt", PLANES)
def test_rows_are_views(fmt: str) -> None:
    """A matrix alone in a buffer, at an offset in one, and a run of its rows."""
    rows, cols = 5, 512
    raw = random_matrix(fmt, rows, cols)
    form = matrix(fmt, rows, cols)
    buffer = rearrange_matrix(raw[0], form)
    assert len(buffer) == form.nbytes
    assert torch.equal(unplane(buffer[None], form), raw)
    if FORMATS[fmt].tiled:  # rows share scales
        return
    some = form.rows_from(2, 2)
    want = dequantise(raw, fmt, rows, cols)
    assert torch.equal(dequantise(unplane(buffer[None], some), fmt, 2, cols), want[:, 2:4])
    taken = form.rows_from(1, 2, pitch=2)
    assert torch.equal(dequantise(unplane(buffer[None], taken), fmt, 2, cols), want[:, 1:5:2])
    shifted = torch.cat([torch.full((48,), 0xFF, dtype=torch.uint8), buffer])
    assert torch.equal(unplane(shifted[None], matrix(fmt, rows, cols, 48)), raw)
