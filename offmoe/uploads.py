"""Records on their way to the GPU by its copy engine: a few landing zones, filled while others are used.

Raw bytes land here; the consumer puts them where they belong, rearranged. Who waits on whom: a zone is filled again
only after its consumer is done (`release`), in the order in which batches were sent.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offmoe.experts import Ints
from offmoe.ram import RamTier
from offmoe.streams import Lane, Mark

ZONES = 2

NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Landing:
    """A batch under way: these experts of `layer` lie one after another in a zone."""

    layer: int
    experts: Ints
    zone: int


class Uploads:
    """At most ZONES batches at a time; `send`, then `receive` and `release` in the same order."""

    def __init__(self, ram: RamTier, batch: int, stride: int, device: torch.device) -> None:
        self.batch = min(batch, ram.table.capacity)  # records
        self.stride = stride
        self.zones = torch.empty((ZONES, self.batch, stride), dtype=torch.uint8, device=device)
        self.waiting: deque[Landing] = deque()
        self._ram, self._sent = ram, 0
        self._lane = Lane(device)
        self._ready = [Mark(device) for _ in range(ZONES)]
        self._free = [Mark(device) for _ in range(ZONES)]

    @property
    def room(self) -> bool:
        return len(self.waiting) < ZONES

    def under_way(self, layer: int) -> Ints:
        """Experts of `layer` that were sent and not received yet."""
        return np.concatenate([NONE, *(landing.experts for landing in self.waiting if landing.layer == layer)])

    def send(self, layer: int, experts: Ints, now: int) -> None:
        """Start to bring at most `batch` experts; returns once the copies are queued (and the disk has answered)."""
        assert self.room, f"batches under way {len(self.waiting)} < {ZONES}"
        landing = Landing(layer, experts, self._sent % ZONES)
        rows = self._fetch(layer, experts, now)
        with self._lane():
            self._free[landing.zone].wait()
            for at, row, count in runs(rows, self._ram.piece_rows):
                self.zones[landing.zone, at : at + count].copy_(self._ram.rows[row : row + count], non_blocking=True)
            self._ready[landing.zone].set()
        self.waiting.append(landing)
        self._sent += 1

    def receive(self) -> Landing:
        """The oldest batch; what is launched from now on may read it."""
        landing = self.waiting.popleft()
        self._ready[landing.zone].wait()
        return landing

    def release(self, landing: Landing) -> None:
        """What was launched so far was the last to read it."""
        self._free[landing.zone].set()

    def addresses(self, landing: Landing) -> Ints:
        """Of its records, int64 [n]."""
        first = self.zones[landing.zone].data_ptr()
        return first + self.stride * np.arange(len(landing.experts), dtype=np.int64)

    def drop(self) -> None:
        """Forget what is under way; zones are safe to fill again."""
        while self.waiting:
            self.release(self.receive())

    def _fetch(self, layer: int, experts: Ints, now: int) -> Ints:
        """RAM rows [n]; where rows are scarce, only once the copies that read them before are done."""
        if not self._ram.whole:
            self._ready[(self._sent - 1) % ZONES].synchronise()
        rows: Tensor = self._ram.fetch(layer, experts, now)
        return rows.numpy()


def runs(rows: Ints, piece: int) -> list[tuple[int, int, int]]:
    """Neighbouring rows as (index of the first, its row, count): one copy each, which the link likes better.

    None crosses a multiple of `piece` rows: those are pinned apart, and CUDA refuses a copy out of two.
    """
    starts = np.flatnonzero((np.diff(rows, prepend=rows[:1] - 2) != 1) | (rows % piece == 0))
    ends = np.append(starts[1:], len(rows))
    return [(int(at), int(rows[at]), int(end - at)) for at, end in zip(starts, ends, strict=True)]
