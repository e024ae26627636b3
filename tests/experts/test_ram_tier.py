"""The RAM tier by itself: what it says is there, what pins it meanwhile, and what becomes of errors."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from ram_tiers import EXPERTS, LAYERS, RECORDS, STRIDE, Disk, Pins, assert_holds, record, tier, until

from offmoe.errors import OffmoeError
from offmoe.machine import disk_reader as transfer
from offmoe.machine import pinned_memory as memory
from offmoe.models.model import Model


@pytest.mark.parametrize("pin", [False, True])
def test_with_a_row_for_every_record_the_row_is_the_record(
    model: Model, pin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = Pins(monkeypatch)
    with tier(model, pin=pin) as ram:
        assert ram.whole
        assert not ram.complete
        assert (ram.known_rows() == -1).all()
        assert ram.fetch(7, np.array([5, 2]), 1).tolist() == [7 * EXPERTS + 5, 7 * EXPERTS + 2]
        ram.fill()
        assert ram.fetch(29, np.array([31, 0]), 1).tolist() == [29 * EXPERTS + 31, 29 * EXPERTS]
        ram.wait_complete()
        assert ram.complete
        assert ram.loaded() == (RECORDS, RECORDS)
        assert ram.known_rows().tolist() == list(range(RECORDS))
        for number in range(0, RECORDS, 37):
            assert_holds(model, ram, number, number)
        assert sum(pins.spans.values()) == (ram.rows.nbytes if pin else 0)
        assert (ram.counts.record_bytes == 4 * record(model, 0).numel()) or not pin, "the fill is not demanded"
    assert not pins.spans


def test_known_rows_are_read_and_pinned_and_the_version_tells(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = Pins(monkeypatch)
    pins.gate.clear()
    with tier(model, pin=True) as ram:
        ram.fill()
        until(lambda: ram.version == RECORDS)
        assert (ram.known_rows() == -1).all(), "nothing is pinned"
        assert not ram.complete
        before = ram.version
        rows = ram.fetch(3, np.arange(4), 1)
        assert rows.tolist() == [96, 97, 98, 99], "the copy engine can do without pinning"
        assert ram.version == before
        pins.gate.set()
        seen = {before}
        while not ram.complete:
            version, known = ram.version, ram.known_rows()
            seen.add(version)
            there = known >= 0
            assert (known[there] == there.nonzero()[0]).all()
        assert ram.version > before
        assert ram.version == RECORDS + len(pins.order)
    assert not pins.spans


def test_pinning_goes_on_while_records_are_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pins, reading = Pins(monkeypatch), threading.Event()
    read = transfer.read_fully
    monkeypatch.setattr(transfer, "read_fully", lambda *a: reading.wait(20) and read(*a))
    with tier(model, pin=True) as ram:
        ram.fill()
        until(lambda: ram._pinning and ram._pinning.rows.all())
        assert len(pins.order) > 10
        assert ram.loaded() == (0, RECORDS)
        reading.set()
        ram.wait_complete()


def test_who_needs_a_row_pinned_gets_its_piece_next(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = Pins(monkeypatch)
    pins.gate.clear()
    with tier(model, pin=True) as ram:
        ram.fill()
        got: list[Any] = []
        thread = threading.Thread(
            target=lambda: got.append(ram.addresses(np.array([RECORDS - 1]), time.monotonic() + 20))
        )
        thread.start()
        until(lambda: ram._pinning and ram._pinning._waiting[0] == len(ram._pinning._parts) - 1)
        assert not got
        pins.gate.set()
        thread.join(20)
        assert got[0].tolist() == [ram.base + (RECORDS - 1) * STRIDE]
        assert pins.order[1] == ram._pinning._parts[-1].data_ptr()  # type: ignore[union-attr]


def test_pieces_are_whole_rows_and_whole_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for stride in (256, 31232, 4096, 5 << 20):
        pins = Pins(monkeypatch)
        rows = memory.host_memory(37 * stride).view(37, stride)
        pinning = memory.Pinning(rows)
        pinning.start()
        pinning.wait(np.arange(37))
        assert pinning.piece_rows * stride % 4096 == 0
        assert sum(pins.spans.values()) == rows.nbytes
        assert all((at - rows.data_ptr()) % stride == 0 for at in pins.spans)
        pinning.close()
        assert not pins.spans


def test_memory_that_cannot_be_pinned_is_an_error_at_every_fetch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = Pins(monkeypatch)
    pins.fails_after = 3
    with tier(model, pin=True) as ram:
        ram.fill()
        with pytest.raises(OffmoeError, match="could not pin"):
            ram.wait_complete()
        for _ in range(2):
            with pytest.raises(OffmoeError, match="could not pin"):
                ram.fetch(0, np.array([1]), 1)
        assert "could not pin" in str(ram.service_error())
        assert not ram.complete
        assert len(pins.spans) == 3
    assert not pins.spans


def test_rows_that_failed_keep_their_place(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.broken = True
    with tier(model) as ram:
        with pytest.raises(OffmoeError, match="Input/output error"):
            ram.fetch(2, np.array([9, 4]), 1)
        with pytest.raises(OffmoeError, match="Input/output error"):
            ram.wait_complete()
        disk.broken = False
        assert ram.fetch(2, np.array([4]), 1).tolist() == [68]
        ram.wait_complete()
        assert ram.known_rows().tolist() == list(range(RECORDS))
        assert_holds(model, ram, 68, 68)


def test_what_the_background_could_not_read_is_tried_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.broken = True
    with tier(model) as ram:
        ram.fill()
        until(lambda: ram.loaded() == (0, RECORDS) and not ram._reads)
        disk.broken = False
        with ram.service():
            until(lambda: ram.complete)
        assert_holds(model, ram, 700, 700)


@pytest.mark.parametrize("rows", [40, RECORDS])
def test_a_disk_that_gives_nothing_is_an_error_and_its_rows_are_not_given_away(
    model: Model, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    monkeypatch.setattr("offmoe.experts.ram_tier.PATIENCE_S", 0.05)
    with tier(model, rows=rows) as ram:
        disk.turns.clear()
        began = time.monotonic()
        for layer in (0, 1):
            with pytest.raises(OffmoeError, match="gives no data"):
                ram.fetch(layer, np.arange(8), 1)
        assert time.monotonic() - began < 1, "not eight times as long for eight records"
        ram.check()
        disk.turns.set()
        monkeypatch.undo()
        for layer in (2, 1, 0, 2):
            for row, expert in zip(ram.fetch(layer, np.arange(32), 1).tolist(), range(32), strict=True):
                assert_holds(model, ram, row, layer * EXPERTS + expert)


def test_with_fewer_rows_nothing_is_known(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Pins(monkeypatch)
    with tier(model, rows=40, pin=True) as ram:
        version = ram.version
        rng = np.random.default_rng(0)
        for _ in range(50):
            layer, experts = int(rng.integers(LAYERS)), rng.choice(EXPERTS, 8, replace=False)
            rows = ram.fetch(layer, experts, ram.table.now + 1)
            for row, expert in zip(rows.tolist(), experts.tolist(), strict=True):
                assert_holds(model, ram, row, layer * EXPERTS + expert)
        assert (ram.known_rows() == -1).all()
        assert ram.version == version
        assert not ram.complete
        assert not ram.whole


@pytest.mark.parametrize("rows", [40, RECORDS])
def test_closing_at_any_time(model: Model, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = Pins(monkeypatch)
    register = pins.register

    def slow(tensor: torch.Tensor) -> None:
        time.sleep(0.01)
        register(tensor)

    monkeypatch.setattr("offmoe.machine.pinned_memory.register", slow)
    for pause in (0.0, 0.002, 0.03):
        with tier(model, rows=rows, pin=True) as ram:
            if ram.whole:
                ram.fill()
            time.sleep(pause)
        assert not pins.spans


def test_a_demanded_record_overtakes_the_fill(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = transfer.read_fully, threading.Semaphore(0)

    def paced(*arguments: Any) -> int:
        reads.acquire()
        return read(*arguments)

    monkeypatch.setattr(transfer, "read_fully", paced)
    with tier(model) as ram:
        ram.fill()
        thread = threading.Thread(target=lambda: ram.fetch(29, np.array([31]), 1))
        thread.start()
        for _ in range(30):  # 4 readers are in the first records; two or three ranges a record
            time.sleep(2e-3)
            reads.release()
        thread.join(2)
        overtook, loaded = not thread.is_alive(), ram.loaded()[0]
        reads.release(10 * RECORDS)
        thread.join(20)
        assert overtook
        assert loaded < 20
