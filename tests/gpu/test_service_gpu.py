"""Requests of a real GPU: round trips through the mailbox, giving up, rows pinned while they are filled."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offmoe.cache.policy import parse_policy
from offmoe.checkpoint.find_model import DEMO
from offmoe.experts.ram_tier import RamTier
from offmoe.experts.uploads import Uploads
from offmoe.kernels.gpu.request import request
from offmoe.kernels.ring import ABORTED, RUN
from offmoe.machine import disk_reader as transfer
from offmoe.machine import pinned_memory as memory
from offmoe.machine.disk_reader import Reader
from offmoe.models.model import Model, open_model

CUDA = torch.device("cuda")
STRIDE, EXPERTS, K, ROUNDS = 31232, 32, 10, 200


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = open_model(DEMO)
    yield model
    model.checkpoint.close()


@pytest.fixture(params=[40, 960], ids=["scarce", "whole"])
def ram(request: pytest.FixtureRequest, model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[RamTier]:
    monkeypatch.setattr(memory, "PIECE", 1 << 20)
    reader = Reader(model.checkpoint.files)
    tier = RamTier(model, request.param, STRIDE, parse_policy("lru"), True, reader)
    yield tier
    torch.cuda.synchronize()
    reader.close()
    tier.close()


class Asker:
    """Static buffers of the decode graph, and the graph of one request."""

    def __init__(self, ram: RamTier, timeout_ns: int = 2_000_000_000) -> None:
        self.ram, self.timeout_ns = ram, timeout_ns
        self.count, self.seq, self.status = (torch.zeros(1, dtype=torch.int32, device=CUDA) for _ in range(3))
        self.records = torch.zeros(K, dtype=torch.int32, device=CUDA)
        self.sources = torch.zeros(K, dtype=torch.int64, device=CUDA)
        self.rows = torch.full((ram.records,), -1, dtype=torch.int32, device=CUDA)
        self.launch()  # compile; asks for nothing
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.launch()

    def launch(self) -> None:
        request(self.ram.mailbox, self.count, self.records, self.sources, self.rows, self.ram.base, STRIDE,
                self.status, self.seq, timeout_ns=self.timeout_ns)  # fmt: skip

    def ask(self, records: list[int]) -> list[int]:
        self.count.fill_(len(records))
        self.records[: len(records)] = torch.tensor(records, dtype=torch.int32)
        self.sources.fill_(-1)
        self.graph.replay()
        torch.cuda.synchronize()
        return self.sources[: int(self.count)].tolist()


def record(model: Model, number: int) -> Tensor:
    return torch.cat([model.checkpoint.read_range(part) for part in model.ranges(*divmod(number, EXPERTS))])


def test_round_trips_give_the_right_bytes(model: Model, ram: RamTier) -> None:
    asker, rng, times = Asker(ram), np.random.default_rng(1), []
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if ram.whole:
        ram.fill()
    with ram.service():
        for at in range(ROUNDS):
            records = (at % 30 * EXPERTS + rng.choice(EXPERTS, rng.integers(1, K + 1), replace=False)).tolist()
            if at % 10 == 9:
                asker.rows.copy_(torch.from_numpy(ram.known_rows()))
            addresses = asker.ask(records)
            assert len(addresses) == len(records), ram.service_error()
            for address, number in zip(addresses, records, strict=True):
                row, rest = divmod(address - ram.base, STRIDE)
                assert rest == 0
                want = record(model, number)
                assert torch.equal(ram.rows[row, : want.numel()], want)
                landed = ram.rows[row, : want.numel()].to(CUDA, non_blocking=True)
                assert torch.equal(landed.cpu(), want)
        asker.rows.fill_(-1)
        for _ in range(ROUNDS):  # resident: what the way there and back takes
            started.record()
            asker.graph.replay()
            ended.record()
            torch.cuda.synchronize()
            times.append(started.elapsed_time(ended) * 1e3)
    assert int(asker.status) == RUN
    first, median, last = np.percentile(times, [1, 50, 99])
    print(f"request of resident records, {torch.cuda.get_device_name()}: {median:.0f} µs ({first:.0f} … {last:.0f})")


def test_without_an_answer_it_gives_up_and_later_requests_do_nothing(ram: RamTier) -> None:
    asker = Asker(ram)
    began = time.perf_counter()
    assert asker.ask([3, 5]) == []
    assert 1.9 < time.perf_counter() - began < 3.0
    assert int(asker.status) == ABORTED
    assert int(asker.seq) == 1
    began = time.perf_counter()
    for _ in range(5):
        assert asker.ask([3, 5]) == []
    assert time.perf_counter() - began < 0.5
    assert int(asker.seq) == 1
    asker.status.fill_(RUN)
    with ram.service():
        assert len(asker.ask([3, 5])) == 2
    assert int(asker.status) == RUN


def test_a_disk_that_fails_or_gives_nothing_is_an_error_and_then_works(
    ram: RamTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker, read, turns, broken = Asker(ram), transfer.read_fully, threading.Event(), [True]

    def perhaps(*arguments: Any) -> int:
        if broken[0]:
            raise OSError(5, "Input/output error")
        assert turns.wait(20)
        return read(*arguments)

    monkeypatch.setattr(transfer, "read_fully", perhaps)
    for message, least, most in (("Input/output error", 0.0, 0.5), ("gives no data", 1.4, 1.95)):
        with ram.service():
            began = time.perf_counter()
            assert asker.ask([3, 5]) == []
            assert least <= time.perf_counter() - began < most
            assert message in str(ram.service_error())
        assert int(asker.status) == ABORTED
        asker.status.fill_(RUN)
        broken[0] = False
    turns.set()
    with ram.service():
        assert len(asker.ask([3, 5])) == 2
    assert int(asker.status) == RUN


def test_memory_is_pinned_while_a_request_spins(ram: RamTier) -> None:
    """Otherwise who waits for a piece to be pinned would wait for itself."""
    asker = Asker(ram)
    asker.count.fill_(1)
    torch.cuda.synchronize()
    more = memory.host_memory(64 << 20)
    asker.graph.replay()
    time.sleep(0.05)
    began = time.perf_counter()
    memory.register(more)
    seconds, spins = time.perf_counter() - began, not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    memory.unregister(more)
    print(f"64 MiB pinned in {seconds * 1e3:.0f} ms while a kernel spins")
    assert spins
    assert seconds < 1


def test_a_complete_tier_answers_from_the_table(ram: RamTier) -> None:
    if not ram.whole:
        return
    ram.wait_complete()
    asker = Asker(ram)
    asker.rows.copy_(torch.from_numpy(ram.known_rows()))
    with ram.service():
        assert asker.ask([959, 0, 17]) == [ram.base + row * STRIDE for row in (959, 0, 17)]
    assert int(asker.seq) == 0


def test_the_gpu_reads_while_other_pieces_are_being_pinned(model: Model, ram: RamTier) -> None:
    """Prefill does so: `addresses` waits for the pieces that are asked for, and for no others."""
    if not ram.whole:
        return
    ram.fill()
    uploads = Uploads(ram, EXPERTS, STRIDE, CUDA)
    for layer in range(30):
        uploads.send(layer, np.arange(EXPERTS), 1)
        landing = uploads.receive()
        rows = ram.rows[layer * EXPERTS : (layer + 1) * EXPERTS]
        assert torch.equal(uploads.zones[landing.zone, :, : rows.shape[1]].cpu(), rows)
        uploads.release(landing)
    ram.wait_complete()
