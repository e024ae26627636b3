"""Fast memory for records. On a GPU a slot holds the record as it is; on the CPU what its kernels want."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from offmoe.kernels.record import RecordLayout, unpack

# Bytes unpacked in one call, which come on top of the budgets. A GPU wants few launches: one record a launch, and
# Qwen3-30B-A3B's shape decodes at 3 tok/s; eight, and it decodes at 8.
TOGETHER, TOGETHER_GPU = 4 << 20, 128 << 20


class Slots(Protocol):
    """Slots addressed by number; `fill` before `weights`."""

    nbytes: int  # really held

    def fill(self, slots: Tensor, records: Tensor, rows: Tensor, layout: RecordLayout) -> None:
        """Put rows [n] of records [R, ≥ nbytes] uint8 into slots [n]; once it returns the rows may change."""

    def weights(self, slots: list[int], layout: RecordLayout) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Of each slot, in groups: gate beside up [H, 2F] and down [F, H], ready for `x @ w`."""


class UnpackedSlots:
    """The CPU's: records are dequantised on their way in, once, since a miss is rarer than a use."""

    def __init__(self, slots: int, layout: RecordLayout, dtype: torch.dtype) -> None:
        hidden, inner = layout.hidden, layout.expert_hidden
        self._gate_up = torch.empty((slots, 2 * inner, hidden), dtype=dtype)
        self._down = torch.empty((slots, hidden, inner), dtype=dtype)
        self.nbytes = self._gate_up.nbytes + self._down.nbytes
        self._batch = max(1, TOGETHER // (self.nbytes // slots))
        self._ready = list(zip(self._gate_up.mT.unbind(), self._down.mT.unbind(), strict=True))

    def fill(self, slots: Tensor, records: Tensor, rows: Tensor, layout: RecordLayout) -> None:
        for some, source in zip(slots.split(self._batch), rows.split(self._batch), strict=True):
            gate_up, down = unpack(records[source], layout, self._gate_up.dtype)
            for slot, *matrices in zip(some.tolist(), gate_up, down, strict=True):  # 3 × as fast as index_copy_
                self._gate_up[slot].copy_(matrices[0])
                self._down[slot].copy_(matrices[1])

    def weights(self, slots: list[int], layout: RecordLayout) -> Iterator[list[tuple[Tensor, Tensor]]]:
        yield [self._ready[slot] for slot in slots]


class PackedSlots:
    """The GPU's: records stay quantised and are unpacked at every use (the naive twin of the fused GEMV)."""

    def __init__(self, slots: int, stride: int, device: torch.device, dtype: torch.dtype) -> None:
        self._records = torch.empty((slots, stride), dtype=torch.uint8, device=device)
        self._dtype = dtype
        self.nbytes = self._records.nbytes
        self._batch = max(1, TOGETHER_GPU // (4 * stride))

    def fill(self, slots: Tensor, records: Tensor, rows: Tensor, layout: RecordLayout) -> None:
        for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
            self._records[slot, : layout.nbytes].copy_(records[row, : layout.nbytes], non_blocking=True)
        torch.cuda.current_stream(self._records.device).synchronize()

    def weights(self, slots: list[int], layout: RecordLayout) -> Iterator[list[tuple[Tensor, Tensor]]]:
        for some in torch.tensor(slots, device=self._records.device).split(self._batch):
            gate_up, down = unpack(self._records[some], layout, self._dtype)
            yield list(zip(gate_up.mT, down.mT, strict=True))
