"""Reads from disk: every byte, whatever the alignment; and what happens when the disk or the file fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from offmoe import transfer
from offmoe.checkpoint import ByteRange
from offmoe.errors import OffmoeError
from offmoe.transfer import BACKGROUND, PAGE, Read, Reader

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

    from concurrent.futures import Future

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
