"""Reads from disk: every byte, whatever the alignment; and what happens when the disk or the file fails."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from offmoe.checkpoint.base import ByteRange
from offmoe.errors import OffmoeError
from offmoe.machine import disk_reader as transfer
from offmoe.machine.disk_reader import BACKGROUND, PAGE, URGENT, Read, Reader

DATA = np.random.default_rng(3).integers(0, 256, 5 * PAGE + 1234, dtype=np.uint8)
PLACES = [(0, 1), (0, PAGE), (1, PAGE), (PAGE - 1, 2), (100, 3 * PAGE), (DATA.size - 7, 7), (0, DATA.size)]


@pytest.fixture(params=["direct", "buffered"])
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    path = tmp_path / "data"
    path.write_bytes(DATA.tobytes())
    if request.param == "buffered":
        monkeypatch.setattr(transfer, "open_direct", lambda path: None)
    reader = Reader([path], threads=2)
    if request.param == "direct" and not reader.direct:
        reader.close()
        pytest.skip("this filesystem refuses O_DIRECT")
    yield reader
    reader.close()


def wanted(*places: tuple[int, int]) -> list[ByteRange]:
    return [ByteRange(0, offset, nbytes) for offset, nbytes in places]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_any_range_is_read_whole(reader: Reader, place: tuple[int, int]) -> None:
    target = np.full(place[1], 0xEE, np.uint8)
    moved = reader.read(wanted(place), target).done.result()
    assert np.array_equal(target, DATA[place[0] : sum(place)])
    assert moved >= place[1]


@pytest.mark.parametrize("chunk", [PAGE, 1000])
def test_long_ranges_are_read_in_chunks(reader: Reader, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK", chunk)
    for priority in (URGENT, BACKGROUND):
        target = np.zeros(sum(nbytes for _, nbytes in PLACES), np.uint8)
        reader.read(wanted(*PLACES), target, priority).done.result()
        assert np.array_equal(target, np.concatenate([DATA[at : at + nbytes] for at, nbytes in PLACES]))


def test_ranges_lie_one_after_another(reader: Reader) -> None:
    target = np.zeros(sum(nbytes for _, nbytes in PLACES) + 5, np.uint8)
    reader.read(wanted(*PLACES), target).done.result()
    assert np.array_equal(target[:-5], np.concatenate([DATA[at : at + nbytes] for at, nbytes in PLACES]))
    assert not target[-5:].any(), "nothing is written behind them"


def test_a_file_that_shrank_is_an_error(reader: Reader) -> None:
    os.truncate(reader.files[0], 2 * PAGE)
    with pytest.raises(OffmoeError, match="data failed: it ends at byte 8192: it shrank while in use"):
        reader.read(wanted((PAGE, 2 * PAGE)), np.zeros(2 * PAGE, np.uint8)).done.result()
    assert reader.read(wanted((0, 9)), np.zeros(9, np.uint8)).done.result(), "the thread lives on"


def test_a_read_error_is_an_error(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OffmoeError, match=r"reading .*data failed: Input/output error"):
        reader.read(wanted((0, 9)), np.zeros(9, np.uint8)).done.result()


def test_a_hurried_read_is_done_once_and_before_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_bytes(DATA.tobytes())
    served: list[int] = []
    serve = Reader._read

    def slow(self: Reader, read: Read, bounce: transfer.Bounce) -> int:
        if not served:
            queued.result()  # until all are in the queue
        served.append(read.ranges[0].offset)
        return serve(self, read, bounce)

    queued: Future[None] = Future()
    monkeypatch.setattr(Reader, "_read", slow)
    reader = Reader([tmp_path / "data"], threads=1)
    reads = [reader.read(wanted((at, 1)), np.zeros(1, np.uint8), BACKGROUND) for at in range(6)]
    reader.hurry(reads[4])
    queued.set_result(None)
    for read in reads:
        read.done.result(timeout=10)
    reader.close()
    assert sorted(served) == list(range(6))
    assert served.index(4) <= 1, "only the read under way came before"


class Gate:
    """Lets one chunk pass at a time."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path.write_bytes(DATA.tobytes())
        self.passes, self.waiting = threading.Semaphore(0), threading.Semaphore(0)
        read = transfer.read_fully

        def paced(*arguments: object) -> int:
            self.waiting.release()
            assert self.passes.acquire(timeout=20)
            return read(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(transfer, "read_fully", paced)
        monkeypatch.setattr(transfer, "CHUNK", PAGE)


@pytest.mark.parametrize("hurried", [False, True])
def test_a_demanded_read_gets_into_the_middle_of_a_long_one(
    hurried: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not of one that is demanded itself."""
    gate = Gate(tmp_path / "data", monkeypatch)
    reader = Reader([tmp_path / "data"], threads=1)
    targets = [np.zeros(nbytes, np.uint8) for nbytes in (5 * PAGE, 9, 9)]
    long = reader.read(wanted((0, 5 * PAGE)), targets[0], BACKGROUND)
    assert gate.waiting.acquire(timeout=10)
    other = reader.read(wanted((7, 9)), targets[1], BACKGROUND)
    if hurried:
        reader.hurry(long)
    demanded = reader.read(wanted((3 * PAGE, 9)), targets[2])
    gate.passes.release(2)
    for _ in range(2):
        assert gate.waiting.acquire(timeout=10)
    assert demanded.done.done() is not hurried
    assert not long.done.done()
    gate.passes.release(20)
    for read, target, at in zip((long, other, demanded), targets, (0, 7, 3 * PAGE), strict=True):
        read.done.result(timeout=10)
        assert np.array_equal(target, DATA[at : at + target.size])
    reader.close()


def test_closing_does_not_wait_for_a_disk_that_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(transfer, "CLOSE_S", 0.05)
    reader = Reader([tmp_path / "data"], threads=2)
    reads = [reader.read(wanted((at, 9)), np.zeros(9, np.uint8)) for at in range(4)]
    for _ in range(2):
        assert gate.waiting.acquire(timeout=10)
    reader.close()
    for read in reads[2:]:
        with pytest.raises(OffmoeError, match="was closed"):
            read.done.result(timeout=0)
    gate.passes.release(2)
    for read in reads[:2]:
        assert read.done.result(timeout=10), "its file is still open"
    for thread in reader._threads:
        thread.join(10)
        assert not thread.is_alive()
