"""RAM tiers of the demo model, over a disk that fails and CUDA that pins on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from offmoe.cache.policy import parse_policy
from offmoe.errors import OffmoeError
from offmoe.experts.ram_tier import RamTier
from offmoe.machine import disk_reader as transfer
from offmoe.machine import pinned_memory as memory
from offmoe.machine.disk_reader import Reader
from offmoe.models.model import Model

STRIDE = 31232
LAYERS, EXPERTS = 30, 32
RECORDS = LAYERS * EXPERTS


class Pins:
    """Stands in for CUDA: which bytes are page-locked. `gate` closed: pinning waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, piece: int = 1 << 20) -> None:
        self.spans: dict[int, int] = {}
        self.order: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails_after = 1 << 30
        for module in ("machine.pinned_memory", "experts.miss_service"):
            monkeypatch.setattr(f"offmoe.{module}.register", self.register)
            monkeypatch.setattr(f"offmoe.{module}.unregister", self.unregister)
        monkeypatch.setattr(memory, "PIECE", piece)

    def register(self, tensor: torch.Tensor) -> None:
        if tensor.dtype == torch.uint8:
            assert self.gate.wait(20)
            if len(self.order) >= self.fails_after:
                raise OffmoeError("CUDA could not pin")
            self.order.append(tensor.data_ptr())
        assert tensor.data_ptr() % 4096 == 0
        assert tensor.data_ptr() not in self.spans
        self.spans[tensor.data_ptr()] = tensor.nbytes

    def unregister(self, tensor: torch.Tensor) -> None:
        assert self.spans.pop(tensor.data_ptr()) == tensor.nbytes


@contextmanager
def tier(model: Model, rows: int = RECORDS, pin: bool = False) -> Iterator[RamTier]:
    reader = Reader(model.checkpoint.files)
    ram = RamTier(model, rows, STRIDE, parse_policy("lru"), pin, reader)
    ram.rows.fill_(0xA5)
    try:
        yield ram
        ram.check()
    finally:
        reader.close()
        ram.close()


def record(model: Model, number: int) -> torch.Tensor:
    return torch.cat([model.checkpoint.read_range(part) for part in model.ranges(*divmod(number, EXPERTS))])


def assert_holds(model: Model, ram: RamTier, row: int, number: int) -> None:
    want = record(model, number)
    assert torch.equal(ram.rows[row, : want.numel()], want), f"row {row} does not hold record {number}"


class Disk:
    """Reads fail, or give nothing, while told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken, self.turns = False, threading.Event()
        self.turns.set()
        read = transfer.read_fully

        def perhaps(*arguments: Any) -> int:
            assert self.turns.wait(20)
            if self.broken:
                raise OSError(5, "Input/output error")
            return read(*arguments)

        monkeypatch.setattr(transfer, "read_fully", perhaps)


def until(happens: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(1e-3)
