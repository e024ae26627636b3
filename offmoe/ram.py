"""The RAM tier: pinned records, all of them or a cache over the model's own file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.cache.policy import make_policy
from offmoe.cache.residency import Residency
from offmoe.memory import host_memory, register, unregister
from offmoe.models.model import Model
from offmoe.transfer import BACKGROUND, URGENT, Read, Reader

Ints = NDArray[np.integer]


@dataclass
class DiskCounts:
    """What was demanded of the disk."""

    bytes: int = 0  # really read: whole pages where O_DIRECT is used
    record_bytes: int = 0  # of these the records' own


class RamTier:
    """Rows of host memory under a residency table of their own; decided by the engine's thread alone.

    With a row for every record the file is read once, in the background and in the file's order, and a demanded
    record overtakes. With fewer rows only what is demanded is read, and the policy evicts.
    """

    def __init__(self, model: Model, rows: int, stride: int, policy: str, pin: bool, reader: Reader) -> None:
        config = model.config
        self.rows = host_memory(rows * stride).view(rows, stride)
        if pin:
            register(self.rows)
        self.table = Residency(config.layers, config.experts, rows, make_policy(policy, model.records), "global")
        self.counts = DiskCounts()
        self._pinned = pin
        self._bytes = self.rows.numpy()
        self._reader = reader
        self._reads: dict[int, Read] = {}  # by row, until landed
        self._ranges = [
            [model.ranges(layer, expert) for expert in range(config.experts)] for layer in range(config.layers)
        ]

    def fill(self) -> None:
        """Begin to read everything; only with a row for every record."""
        experts = np.arange(self.table.experts)
        for layer in range(self.table.layers):
            access = self.table.access(layer, experts, 0)
            self._begin(layer, experts, access.slots, BACKGROUND)

    def fetch(self, layer: int, experts: Ints, now: int) -> Tensor:
        """Rows [n] (int64) that hold these experts, at most `table.capacity` of them; waits for the disk."""
        self._land_left_over()
        access = self.table.access(layer, experts, now)
        absent = ~(access.hit | access.late)
        reads = self._begin(layer, experts[absent], access.slots[absent])
        for row in access.slots[access.late].tolist():
            self._reader.hurry(self._reads[row])
            reads.append((row, self._reads[row]))
        self._wait(reads)
        return torch.from_numpy(access.slots.astype(np.int64))

    def check(self) -> None:
        self.table.check()

    def close(self) -> None:
        """Only after the reader is closed: its threads write here."""
        if self._pinned:
            unregister(self.rows)

    def _begin(self, layer: int, experts: Ints, rows: Ints, priority: int = URGENT) -> list[tuple[int, Read]]:
        for expert, row in zip(experts.tolist(), rows.tolist(), strict=True):
            self._reads[row] = self._reader.read(self._ranges[layer][expert], self._bytes[row], priority)
        return [(row, self._reads[row]) for row in rows.tolist()]

    def _wait(self, reads: list[tuple[int, Read]]) -> None:
        """Every read ends before an error is raised: none may write into a row that is given away."""
        errors = [error for row, read in reads if (error := read.done.exception()) is not None]
        for row, read in reads:
            self._land(row, read)
        if errors:
            raise errors[0]
        self.counts.bytes += sum(read.done.result() for _, read in reads)
        self.counts.record_bytes += sum(wanted.nbytes for _, read in reads for wanted in read.ranges)

    def _land_left_over(self) -> None:
        """Of the background fill what has finished; where rows are scarce all, left by a fetch broken off."""
        whole = self.table.slots == self.table.layers * self.table.experts
        for row, read in list(self._reads.items()):
            if not whole or read.done.done():
                self._land(row, read)

    def _land(self, row: int, read: Read) -> None:
        del self._reads[row]
        if read.done.exception() is None:
            self.table.landed(np.array([row]))
        else:
            self.table.abandon(np.array([row]))
