"""The RAM tier: records in (pinned) memory, all of them or a cache over the model's file."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.cache.policy import PolicySpec
from offmoe.cache.residency import Residency
from offmoe.errors import OffmoeError
from offmoe.experts.miss_service import MissService
from offmoe.machine.disk_reader import BACKGROUND, URGENT, Read, Reader
from offmoe.machine.pinned_memory import Pinning, host_memory
from offmoe.models.model import Model

Ints = NDArray[np.integer]
PATIENCE_S = 20.0  # for a silent disk: one that has to spin up takes 10 s


@dataclass
class DiskCounts:
    """Demanded reads."""

    bytes: int = 0  # read from disk: whole pages where O_DIRECT is used
    record_bytes: int = 0  # the records' own part of them


class RamTier:
    """Rows of host memory with a residency table of their own.

    With a row for every record (`whole`), row = record: the file is read once, in the background and in file order, and
    demanded records overtake. With fewer rows only demanded records are read, and the policy evicts.

    Threads: one thread at a time fetches, the engine's or, while the GPU is served, the miss service's. The engine's
    thread may ask for the progress of background reads at any time.
    """

    def __init__(self, model: Model, rows: int, stride: int, policy: PolicySpec, pin: bool, reader: Reader) -> None:
        config = model.config
        self.rows = host_memory(rows * stride).view(rows, stride)
        self.table = Residency(config.moe_layers, config.experts, rows, policy.make(model.records), "global")
        self.records = model.records
        self.whole = rows >= model.records
        self.counts = DiskCounts()
        self._bytes = self.rows.numpy()
        self._reader = reader
        self._reads: dict[int, Read] = {}  # by row, until landed
        self._finished: deque[tuple[int, Read]] = deque()  # reads that ended, in the readers' order
        self._failed = self._complete = False  # a background read failed; every record is present
        self._landed = 0  # successful reads; with a row for every record, the rows that are filled
        self._fetching = threading.Lock()  # held for a whole fetch
        self._lock = threading.Lock()  # guards the table and _reads
        self._ranges = [
            [model.ranges(layer, expert) for expert in range(config.experts)] for layer in range(config.moe_layers)
        ]
        self._to_row_major = model.to_row_major
        self._transposed = [model.transposed(layer) for layer in range(config.moe_layers)]
        self._pin, self._k = pin, config.top_k
        self._pinning = Pinning(self.rows) if pin else None
        self._service: MissService | None = None
        if not self.whole:
            self._start_pinning()

    @property
    def base(self) -> int:
        """Address of row 0."""
        return self.rows.data_ptr()

    def fill(self) -> None:
        """Start reading all absent records in the background. Needs a row for every record."""
        assert self.whole, f"rows {len(self.rows)} ≥ {self.records} records"
        self._start_pinning()
        self._land_finished()
        experts = np.arange(self.table.experts)
        with self._lock:
            self._failed = False
            for layer in range(self.table.layers):
                rows, absent, _ = self._access(layer, experts, 0)
                self._begin(layer, experts[absent], rows[absent], BACKGROUND)

    def fetch(self, layer: int, experts: Ints, now: int, end: float = math.inf) -> Tensor:
        """Return the rows [n] (int64) of these experts, at most `table.capacity` of them, after waiting for the disk.

        Waits until `end` (on time.monotonic's clock) at most, and PATIENCE_S for one record. Raises OffmoeError.
        """
        self._start_pinning()
        with self._fetching:
            if self._pinning:
                self._pinning.check()
            self._land_finished() if self.whole else self._land_left_over(end)
            with self._lock:
                rows, absent, late = self._access(layer, experts, now)
                reads = self._begin(layer, experts[absent], rows[absent])
                for row in rows[late].tolist():
                    self._reader.hurry(self._reads[row])
                    reads.append((row, self._reads[row]))
            self._wait(reads, end)
            self._count([read for _, read in reads])
        return torch.from_numpy(rows.astype(np.int64))

    def addresses(self, records: Ints, end: float = math.inf, now: int = 0) -> Ints:
        """Return the addresses [n] (int64) of these records of one layer, read and pinned, for the GPU to read."""
        if self.complete:
            return self.base + records.astype(np.int64) * self.rows.stride(0)
        layer, experts = int(records[0]) // self.table.experts, records % self.table.experts
        assert (records // self.table.experts == layer).all(), f"records {records} are not all of layer {layer}"
        rows: Ints = self.fetch(layer, experts, now, end).numpy()
        if self._pinning:
            self._pinning.wait(rows, end)
        return self.base + rows * self.rows.stride(0)

    @property
    def version(self) -> int:
        """A number that changes whenever known_rows does."""
        if not self.whole:
            return 0
        self._land_finished()
        return self._landed + (self._pinning.pieces if self._pinning else 0)

    def known_rows(self) -> NDArray[np.int32]:
        """Return the row of every record [records], or −1 where it may have to be waited for."""
        rows = np.full(self.records, -1, np.int32)
        if self.whole:
            there = self._there()
            rows[there] = there.nonzero()[0]
        return rows

    @property
    def complete(self) -> bool:
        """Whether every record is present and will stay."""
        if self.whole and not self._complete:
            self._land_finished()
            self._complete = self._landed == self.records and (not self._pinning or bool(self._pinning.rows.all()))
        return self._complete

    def wait_complete(self) -> None:
        """Wait until every record is read and pinned; failed reads are tried again."""
        self.fill()
        with self._lock:
            reads = list(self._reads.items())
        self._wait(reads)
        if self._pinning:
            self._pinning.wait(np.arange(len(self.rows)))

    def loaded(self) -> tuple[int, int]:
        """Return how many records are present, and how many will be; (0, 0) with fewer rows than records."""
        return (int(self._there().sum()), self.records) if self.whole else (0, 0)

    @property
    def mailbox(self) -> int:
        """Address of the mailbox (kernels.mailbox) through which the GPU asks for records."""
        return self._served_by().address

    def service(self) -> AbstractContextManager[None]:
        """Serve the GPU's requests inside. Failed background reads are tried again."""
        complete = self.complete
        if self._failed:
            self.fill()
        return nullcontext() if complete else self._served_by().serving()

    def service_error(self) -> OffmoeError | None:
        """Return the error of the last failed request (once), or of pinning (always), or None."""
        error = self._pinning.error if self._pinning else None
        if self._service:
            error, self._service.error = self._service.error or error, None
        return error

    def check(self) -> None:
        with self._lock:
            self.table.check()

    def close(self) -> None:
        """Release memory. Close the reader first: its threads write here, and the miss service waits for them."""
        if self._pinning:
            self._pinning.close()
        if self._service:
            self._service.close()

    def _served_by(self) -> MissService:
        self._service = self._service or MissService(self.addresses, self._k, self._pin)
        return self._service

    def _start_pinning(self) -> None:
        if self._pinning:
            self._pinning.start()

    def _there(self) -> NDArray[np.bool_]:
        """Return which records [records] are read and pinned, with a row for every record."""
        self._land_finished()
        with self._lock:
            there: NDArray[np.bool_] = (self.table.slot_of >= 0) & ~self.table.arriving[: self.records]
        return there & self._pinning.rows[: self.records] if self._pinning else there

    def _access(self, layer: int, experts: Ints, now: int) -> tuple[Ints, NDArray[np.bool_], NDArray[np.bool_]]:
        """Return rows [n], which of them have to be read, and which are being read. The clock never goes back."""
        if not self.whole:
            access = self.table.access(layer, experts, max(now, self.table.now))
            return access.slots, ~(access.hit | access.late), access.late
        # Row = record: the table would give the first free row after a failed read.
        rows = experts + layer * self.table.experts
        absent = self.table.slot_of[rows] < 0
        late = self.table.arriving[rows]
        new = rows[absent]
        self.table.slot_of[new] = self.table.owner[new] = new
        self.table.arriving[new] = True
        return rows, absent, late

    def _begin(self, layer: int, experts: Ints, rows: Ints, priority: int = URGENT) -> list[tuple[int, Read]]:
        for expert, row in zip(experts.tolist(), rows.tolist(), strict=True):
            transform = self._to_row_major(layer, expert) if self._transposed[layer] else None
            read = self._reads[row] = self._reader.read(
                self._ranges[layer][expert], self._bytes[row], priority, transform
            )
            if self.whole:
                read.done.add_done_callback(partial(self._finish, row, read))
        return [(row, self._reads[row]) for row in rows.tolist()]

    def _wait(self, reads: list[tuple[int, Read]], end: float = math.inf) -> None:
        """Wait until all reads have ended. An unfinished one stays `arriving`: its row is not given away."""
        silent = self._join(reads, end)
        for _, read in reads:
            if read.done.done() and (error := read.done.exception()) is not None:
                raise error
        if silent:
            raise silent

    def _join(self, reads: list[tuple[int, Read]], end: float) -> OffmoeError | None:
        """Land the reads that end in time; return an error if others are left. Failures of reads are not examined."""
        silent = None
        try:
            for _, read in reads:
                read.done.exception(max(0.0, min(PATIENCE_S, end - time.monotonic())))
        except TimeoutError:
            path = self._reader.files[read.ranges[0].file]
            silent = OffmoeError(f"{path} gives no data: is its disk there, or very slow? The next answer tries again")
        with self._lock:
            for row, read in reads:
                if read.done.done():
                    self._land(row, read)
        return silent

    def _count(self, reads: list[Read]) -> None:
        self.counts.bytes += sum(read.done.result() for read in reads)
        self.counts.record_bytes += sum(wanted.nbytes for read in reads for wanted in read.ranges)

    def _finish(self, row: int, read: Read, _: Future[int]) -> None:
        """Note the end of a read. Called in a reader's thread."""
        self._finished.append((row, read))

    def _land_finished(self) -> None:
        with self._lock:
            while self._finished:
                self._land(*self._finished.popleft())

    def _land_left_over(self, end: float) -> None:
        """Wait for reads left over from an interrupted fetch: with few rows, all of them may be needed."""
        if silent := self._join(list(self._reads.items()), end):
            raise silent

    def _land(self, row: int, read: Read) -> None:
        """Land a read once, for whichever of the fetch and the background comes first."""
        if self._reads.get(row) is not read:
            return
        del self._reads[row]
        if read.done.exception() is None:
            self._landed += 1
            self.table.landed(np.array([row]))
        else:
            self.table.abandon(np.array([row]))
            self._failed = self.whole
