"""Records on their way to the GPU: a few landing zones, filled while others are used.

A batch is one launch that reads pinned memory. The copy engine is 5 % faster, but wants a call for every run of
neighbouring rows: 1,500 in a prompt of 512 tokens, 31 µs each, and it was the host that was waited for.
Raw bytes land here; the consumer puts them where they belong, rearranged. Who waits on whom: a zone is filled again
only after its consumer is done (`release`), in the order in which batches were sent.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offmoe.experts.ram_tier import RamTier
from offmoe.experts.store import Ints
from offmoe.kernels.gpu.page_in import Copies, page_in, scratch_for
from offmoe.machine.streams import Event, Stream

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
        self._ram, self._sent, self._scratch = ram, 0, scratch_for(device)
        self._stream = Stream(device)
        self._ready = [Event(device) for _ in range(ZONES)]
        self._free = [Event(device) for _ in range(ZONES)]

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
        n, sources = len(experts), self._fetch(layer, experts, now)
        with self._stream():
            packed = on_gpu(np.concatenate([sources, np.arange(n), [n]]), self.zones.device)
            self._free[landing.zone].wait()
            page_in(Copies(packed[2 * n :], packed[n : 2 * n], self._scratch, packed[:n]), self.zones[landing.zone])
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
        """Addresses [n]; where rows are scarce, only once the copies that read them before are done."""
        if not self._ram.whole:
            self._ready[(self._sent - 1) % ZONES].synchronise()
        return self._ram.addresses(layer * self._ram.table.experts + experts, now=now)


def on_gpu(numbers: Ints, device: torch.device) -> Tensor:
    """Without waiting: torch would synchronise the stream, CUDA has copied pageable memory once it returns."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)
