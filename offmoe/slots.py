"""Fast memory for records. On a GPU a slot holds the record as it is; on the CPU what its kernels want."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.record import RecordLayout, unpack

TOGETHER = 4 << 20  # bytes of records unpacked in one call: bounds the memory beside the budgets


class Slots(Protocol):
    """Slots addressed by number; `fill` before `weights`."""

    nbytes: int  # really held

    def fill(self, slots: Tensor, records: Tensor, rows: Tensor, layout: RecordLayout) -> None:
        """Put rows [n] of records [R, ≥ nbytes] uint8 into slots [n]; once it returns the rows may change."""

    def weights(self, slots: list[int], layout: RecordLayout) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Of each slot, in groups: gate over up [2F, H] and down [H, F], ready to multiply with."""


class UnpackedSlots:
    """The CPU's: records are dequantised on their way in, once, since a miss is rarer than a use."""

    def __init__(self, slots: int, layout: RecordLayout, dtype: torch.dtype) -> None:
        hidden, inner = layout.hidden, layout.expert_hidden
        self._gate_up = torch.empty((slots, 2 * inner, hidden), dtype=dtype)
        self._down = torch.empty((slots, hidden, inner), dtype=dtype)
        self.nbytes = self._gate_up.nbytes + self._down.nbytes
        self._batch = batch(self.nbytes // slots)

    def fill(self, slots: Tensor, records: Tensor, rows: Tensor, layout: RecordLayout) -> None:
        for some, source in zip(slots.split(self._batch), rows.split(self._batch), strict=True):
            gate_up, down = unpack(records[source], layout, self._gate_up.dtype)
            self._gate_up.index_copy_(0, some, gate_up)
            self._down.index_copy_(0, some, down)

    def weights(self, slots: list[int], layout: RecordLayout) -> Iterator[list[tuple[Tensor, Tensor]]]:
        yield [(self._gate_up[slot], self._down[slot]) for slot in slots]


class PackedSlots:
    """The GPU's: records stay quantised and are unpacked at every use (the naive twin of the fused GEMV)."""

    def __init__(self, slots: int, stride: int, device: torch.device, dtype: torch.dtype) -> None:
        self._records = torch.empty((slots, stride), dtype=torch.uint8, device=device)
        self._dtype = dtype
        self.nbytes = self._records.nbytes
        self._batch = batch(stride * 4)

    def fill(self, slots: Tensor, records: Tensor, rows: Tensor, layout: RecordLayout) -> None:
        for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
            self._records[slot, : layout.nbytes].copy_(records[row, : layout.nbytes], non_blocking=True)
        torch.cuda.current_stream(self._records.device).synchronize()

    def weights(self, slots: list[int], layout: RecordLayout) -> Iterator[list[tuple[Tensor, Tensor]]]:
        for some in torch.tensor(slots, device=self._records.device).split(self._batch):
            gate_up, down = unpack(self._records[some], layout, self._dtype)
            yield list(zip(gate_up, down, strict=True))


def batch(unpacked: int) -> int:
    """How many records of `unpacked` bytes are unpacked together."""
    return max(1, TOGETHER // unpacked)


def host_rows(rows: int, stride: int, pin: bool) -> Tensor:
    """[rows, stride] uint8 in host memory, to the byte: torch's pinned allocator rounds up to powers of two."""
    try:
        memory = mmap.mmap(-1, max(rows * stride, 1))
    except OSError:
        raise OffmoeError(f"the machine refuses {rows * stride} bytes of memory: lower --ram") from None
    tensor = torch.from_numpy(np.frombuffer(memory, np.uint8))[: rows * stride].view(rows, stride)
    if pin:
        register(tensor)
    return tensor


def register(tensor: Tensor) -> None:
    """Page-lock host memory for the GPU's copy engine."""
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(status) != 0:
        raise OffmoeError(
            f"CUDA could not pin {tensor.nbytes} bytes of memory (error {int(status)}): lower --ram; "
            "`offmoe doctor` shows the limit"
        )


def unregister(tensor: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
