"""Records for the GPU in the middle of a step: the host's thread, and the kernel that asks through the interpreter."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ram_tiers import EXPERTS, LAYERS, RECORDS, STRIDE, Disk, Pins, assert_holds, tier, until
from torch import Tensor

from offmoe.experts.miss_service import MissService
from offmoe.experts.ram_tier import RamTier
from offmoe.kernels.mailbox import ADDRESSES, COUNT, ERROR, answer_word, mailbox_words
from offmoe.kernels.mailbox import RECORDS as WORDS_OF_RECORDS
from offmoe.kernels.ring import ABORTED, DONE, RUN
from offmoe.models.model import Model

K = 10  # of the demo model


class Asker:
    """What the GPU does, in NumPy."""

    def __init__(self, ram: RamTier) -> None:
        assert ram.mailbox
        assert ram._service is not None
        self.ram, self.words, self.number = ram, ram._service.memory.numpy(), 0
        self.answer = self.words[answer_word(K) :]

    def ask(self, records: Any, timeout: float = 20.0) -> list[int]:
        """Rows [n], or none: the request failed."""
        self.number += 1
        self.words[WORDS_OF_RECORDS:][: len(records)] = records
        self.words[COUNT] = len(records)
        self.words[0] = self.number
        deadline = time.monotonic() + timeout
        while self.answer[0] != self.number:
            assert time.monotonic() < deadline, "no answer"
            time.sleep(1e-5)
        if self.answer[ERROR]:
            return []
        offsets = self.answer[ADDRESSES:].view(np.int64)[: len(records)] - self.ram.base
        assert (offsets % STRIDE == 0).all()
        return (offsets // STRIDE).tolist()


def requests(rounds: int) -> Iterator[Any]:
    rng = np.random.default_rng(3)
    for at in range(rounds):
        yield at % LAYERS * EXPERTS + rng.choice(EXPERTS, rng.integers(1, K + 1), replace=False)


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("rows", [32, 200, RECORDS])
def test_the_right_bytes_whatever_the_rows(
    model: Model, rows: int, pin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    pins = Pins(monkeypatch)
    with tier(model, rows=rows, pin=pin) as ram:
        asker = Asker(ram)
        if ram.whole:
            ram.fill()
        with ram.service():
            for records in requests(150):
                got = asker.ask(records)
                assert len(got) == len(records)
                assert not pin or ram._pinning.rows[got].all()  # type: ignore[union-attr]
                for row, number in zip(got, records.tolist(), strict=True):
                    assert_holds(model, ram, row, number)
        assert ram.service_error() is None
    assert not pins.spans


def test_nobody_looks_outside_an_answer_and_nothing_given_up_is_served(model: Model) -> None:
    with tier(model, rows=32) as ram:
        asker = Asker(ram)
        before = sys.getswitchinterval()
        for _ in range(3):
            with ram.service():
                assert sys.getswitchinterval() < before
                assert asker.ask([5, 7])
            assert sys.getswitchinterval() == before
            reads = ram.counts.bytes
            with pytest.raises(AssertionError, match="no answer"):
                asker.ask([40, 41], timeout=0.05)
            with ram.service():
                time.sleep(0.01)
            assert ram.counts.bytes == reads
            assert ram.table.slot_of[40] == -1
        for _ in range(300):  # shorter than the thread takes to notice
            with ram.service():
                pass
        with ram.service():
            assert asker.ask([5, 7])


def test_a_complete_tier_needs_no_service(model: Model) -> None:
    with tier(model) as ram:
        ram.wait_complete()
        with ram.service():
            assert ram._service is None


def test_an_error_is_kept_once_and_the_next_request_may_succeed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    disk = Disk(monkeypatch)
    disk.broken = True
    with tier(model, rows=32) as ram:
        asker = Asker(ram)
        with ram.service():
            assert asker.ask([8, 3]) == []
            assert "Input/output error" in str(ram.service_error())
            assert ram.service_error() is None
            disk.broken = False
            for row, number in zip(asker.ask([8, 3]), [8, 3], strict=True):
                assert_holds(model, ram, row, number)
            assert asker.ask([8, 3 + EXPERTS]) == [], "of two layers"
        with ram.service():
            assert ram.service_error() is None, "it was the last answer's"


@pytest.mark.parametrize("rows", [32, RECORDS])
def test_a_disk_that_gives_nothing_is_an_error_before_the_gpu_gives_up(
    model: Model, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    disk = Disk(monkeypatch)
    with tier(model, rows=rows) as ram:
        asker = Asker(ram)
        disk.turns.clear()
        if ram.whole:
            ram.fill()
        began = time.monotonic()
        with ram.service():
            assert asker.ask(range(70, 80)) == []
            assert "gives no data" in str(ram.service_error())
        assert 1 < time.monotonic() - began < 1.9
        disk.turns.set()
        with ram.service():
            for records in (range(100, 110), range(70, 80)):
                for row, number in zip(asker.ask(records), records, strict=True):
                    assert_holds(model, ram, row, number)


def test_memory_that_takes_too_long_to_pin_is_an_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = Pins(monkeypatch)
    monkeypatch.setattr("offmoe.experts.miss_service.ANSWER_S", 0.05)
    pins.gate.clear()
    with tier(model, rows=32, pin=True) as ram:
        asker = Asker(ram)
        with ram.service():
            assert asker.ask([1, 2]) == []
            assert "too long to pin" in str(ram.service_error())
            pins.gate.set()
            until(lambda: ram._pinning and ram._pinning.rows.all())
            assert len(asker.ask([1, 2])) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_missed_by_one_answer_only(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: MissService, number: int) -> None:
        raise SystemExit

    with tier(model, rows=32) as ram:
        asker = Asker(ram)
        with monkeypatch.context() as patch:
            patch.setattr(MissService, "_serve", dies)
            with ram.service(), pytest.raises(AssertionError, match="no answer"):
                asker.ask([1], timeout=0.1)
        with ram.service():
            assert asker.ask([1])


def test_the_clock_does_not_go_back_for_who_fetches_afterwards(model: Model) -> None:
    with tier(model, rows=32) as ram:
        asker = Asker(ram)
        ram.fetch(0, np.array([1]), 9)
        with ram.service():
            asker.ask([33])
        ram.fetch(0, np.array([2]), 4)


def test_closing_while_a_request_waits_for_the_disk(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pins, disk = Pins(monkeypatch), Disk(monkeypatch)
    disk.turns.clear()
    with tier(model, pin=True) as ram:
        ram.fill()
        asker = Asker(ram)
        service = ram.service()
        service.__enter__()
        with pytest.raises(AssertionError, match="no answer"):
            asker.ask(range(64, 74), timeout=0.02)
        threading.Timer(0.05, disk.turns.set).start()
    service.__exit__(None, None, None)
    assert not pins.spans


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Kernel:
    """All that `request` touches, in an interpreter; `words` is the mailbox."""

    def __init__(self, words: Tensor, base: int, stride: int, rows: Tensor) -> None:
        self.words, self.base, self.stride, self.rows = words, base, stride, rows
        self.count, self.records, self.seq, self.status = ints(0), ints(*[0] * K), ints(0), ints(RUN)
        self.sources = torch.full((K,), -77, dtype=torch.int64)

    def __call__(self, records: list[int], timeout_ns: int = 20_000_000_000) -> list[int]:
        from offmoe.kernels.gpu.request import request

        self.count[0] = len(records)
        self.records[: len(records)] = ints(*records)
        self.sources.fill_(-77)
        request(self.words.data_ptr(), self.count, self.records, self.sources, self.rows, self.base, self.stride,
                self.status, self.seq, timeout_ns=timeout_ns)  # fmt: skip
        assert (self.sources[int(self.count) :] == -77).all()
        return self.sources[: int(self.count)].tolist()


@pytest.fixture
def kernel() -> Kernel:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs it for real")
    rows = torch.tensor([-1, 4, 0, 2, -1, 7], dtype=torch.int32)
    return Kernel(torch.zeros(mailbox_words(K), dtype=torch.int32), 1 << 40, STRIDE, rows)


def test_known_rows_need_nobody(kernel: Kernel) -> None:
    assert kernel([1, 2, 5]) == [(1 << 40) + row * STRIDE for row in (4, 0, 7)]
    assert kernel([]) == []
    assert not kernel.words.any()
    assert int(kernel.seq) == 0


def test_one_that_is_not_known_and_all_are_asked_for(kernel: Kernel) -> None:
    answer = kernel.words[answer_word(K) :]
    answer[0] = 1
    answer[ADDRESSES:].view(torch.int64)[:3] = torch.tensor([11 << 40, 12 << 40, 13])
    assert kernel([1, 4, 3]) == [11 << 40, 12 << 40, 13]
    assert kernel.words[: WORDS_OF_RECORDS + 3].tolist() == [1, 3, 1, 4, 3]
    assert int(kernel.seq) == 1
    assert int(kernel.status) == RUN


def test_no_answer_aborts_and_later_requests_do_nothing(kernel: Kernel) -> None:
    assert kernel([4], timeout_ns=2_000_000) == []
    assert int(kernel.status) == ABORTED
    assert int(kernel.seq) == 1, "a late answer is not taken for the next one's"
    assert kernel([1, 4]) == []
    assert int(kernel.seq) == 1
    kernel.status[0] = DONE
    assert kernel([1]) == []
    assert int(kernel.status) == DONE


def test_a_failed_answer_aborts(kernel: Kernel) -> None:
    kernel.words[answer_word(K)], kernel.words[answer_word(K) + ERROR] = 1, 1
    assert kernel([4]) == []
    assert int(kernel.status) == ABORTED


def test_the_kernel_and_the_service(kernel: Kernel, model: Model) -> None:
    with tier(model, rows=32) as ram:
        assert ram.mailbox
        asks = Kernel(ram._service.memory, ram.base, STRIDE, torch.from_numpy(ram.known_rows()))  # type: ignore[union-attr]
        with ram.service():
            for records in requests(15):
                for address, number in zip(asks(records.tolist()), records.tolist(), strict=True):
                    assert_holds(model, ram, (address - ram.base) // STRIDE, number)
        assert int(asks.seq) == 15
        assert int(asks.status) == RUN
