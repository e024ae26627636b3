"""What the device fetches lies in its slot as the naive twin puts it; other slots stay as they are."""

from __future__ import annotations

import pytest
import torch
from quantised_matrices import TESTED
from torch import Tensor

from offmoe.kernels import page_in as naive
from offmoe.kernels.formats import FORMATS
from offmoe.kernels.planes import SlotLayout, slot_layout, unplane
from offmoe.kernels.record import RecordLayout

pytest.importorskip("triton")
from offmoe.kernels.gpu.page_in import CHUNK, WARPS, Copies, page_in, scratch_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROGRAMS = 2


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Memory:
    """Five rows of pinned RAM, all bytes occur, and four slots of 0xFF for either twin."""

    def __init__(self, record: RecordLayout) -> None:
        self.layout: SlotLayout = slot_layout(record)
        self.stride = -(-max(record.nbytes, self.layout.nbytes) // 256) * 256
        generator = torch.Generator().manual_seed(3)
        rows = torch.randint(0, 256, (5, self.stride), dtype=torch.uint8, generator=generator)
        self.rows = rows.pin_memory() if DEVICE.type == "cuda" else rows
        self.target, self.want = (torch.full((4, self.stride), 0xFF, dtype=torch.uint8, device=DEVICE) for _ in "ab")
        self.landed, self.progress = (torch.zeros(4, dtype=torch.int32, device=DEVICE) for _ in "ab")

    def check(self, records: Tensor, count: int, slots: Tensor, addressed: bool) -> None:
        to = ints(count), slots, scratch_for(DEVICE, PROGRAMS * WARPS * CHUNK)
        if addressed:
            copies = Copies(*to, self.rows.data_ptr() + records.long() * self.stride)
        else:
            copies = Copies(*to, records=records, base=self.rows.data_ptr(), stride=self.stride)
        page_in(
            copies, self.target, self.layout, programs=PROGRAMS, landed=self.landed, progress=self.progress
        )  # fmt: skip
        naive.page_in(self.rows.to(DEVICE), records, ints(count), slots, self.want, self.layout)
        filled = slots[:count].tolist()
        for form in (self.layout.gate, self.layout.up, self.layout.down):
            assert torch.equal(unplane(self.target, form), unplane(self.want, form)), form
        for slot in range(4):
            assert bool(self.landed[slot]) == (slot in filled)
            assert slot in filled or (self.target[slot] == 0xFF).all()
        assert not self.progress.any()


def record_of(fmt: str, down: str, stacked: bool) -> RecordLayout:
    h, f = (256, 256) if max(FORMATS[fmt].block, FORMATS[down].block) > 32 else (160, 96)
    h = 512 if FORMATS[fmt].tiled else h
    if stacked:
        return RecordLayout.of(("gate_up", fmt, 2 * f, h), ("down", down, h, f))
    return RecordLayout.of(("gate", fmt, f, h), ("up", fmt, f, h), ("down", down, h, f))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("fmt", TESTED)
def test_first_of_a_list(fmt: str, stacked: bool) -> None:
    """Two of three records; runs end within a chunk."""
    memory = Memory(record_of(fmt, fmt if stacked else "Q8_0", stacked))
    memory.check(ints(4, 2, 1), 2, ints(3, 1, 0), addressed=stacked)


def test_several_chunks_a_run() -> None:
    record = RecordLayout.of(("gate", "MXFP4", 128, 512), ("up", "Q4_K", 128, 512), ("down", "F16", 512, 128))
    assert all(part.nbytes > 2 * CHUNK * WARPS for part in record.parts)
    Memory(record).check(ints(0, 3), 2, ints(2, 0), addressed=False)


@pytest.mark.parametrize(("fmt", "rows", "cols"), [("MXFP4", 8, 32), ("Q8_0", 4, 32), ("Q6_K", 4, 256)])
def test_a_run_that_starts_within_16_bytes(fmt: str, rows: int, cols: int) -> None:
    record = RecordLayout.of(("gate", fmt, rows, cols), ("up", fmt, rows, cols), ("down", "BF16", cols, rows))
    assert record.parts[1].offset % 16 == 8
    Memory(record).check(ints(3, 1), 2, ints(0, 2), addressed=True)


def test_nothing_missing() -> None:
    """What a count of 0 leaves behind in the list is not read."""
    memory = Memory(record_of("Q4_0", "Q4_0", False))
    memory.check(ints(2**30, -5), 0, ints(2**30, -7), addressed=True)
