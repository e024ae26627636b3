"""Uploads of records to the GPU while a prompt runs: landing zones, one filled while another is consumed.

A batch is one kernel launch that reads pinned memory. The copy engine is 5 % faster, but needs a call for every run of
neighbouring rows: 1,500 of 31 µs in a prompt of 512 tokens, which made the host the bottleneck. Zones receive records
as they are in the file; the consumer rearranges them into slots. A zone is filled again only after its consumer has
called `release`; batches are received in the order in which they were sent.
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
    """A batch under way: records of `experts` of one MoE layer, one after another in a zone."""

    layer: int
    experts: Ints
    zone: int


class Uploads:
    """Up to ZONES batches at a time: `send`, then `receive` and `release` in the same order."""

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
        """Return the experts of `layer` that were sent and not yet received."""
        return np.concatenate([NONE, *(landing.experts for landing in self.waiting if landing.layer == layer)])

    def send(self, layer: int, experts: Ints, now: int) -> None:
        """Start to upload at most `batch` experts; return once the copies are queued (and the disk has answered)."""
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
        """Return the oldest batch; kernels launched from now on may read it."""
        landing = self.waiting.popleft()
        self._ready[landing.zone].wait()
        return landing

    def release(self, landing: Landing) -> None:
        """Let the zone be filled again once all kernels launched so far are done."""
        self._free[landing.zone].set()

    def addresses(self, landing: Landing) -> Ints:
        """Return the addresses of a batch's records, int64 [n]."""
        first = self.zones[landing.zone].data_ptr()
        return first + self.stride * np.arange(len(landing.experts), dtype=np.int64)

    def drop(self) -> None:
        """Discard all batches under way and free their zones."""
        while self.waiting:
            self.release(self.receive())

    def _fetch(self, layer: int, experts: Ints, now: int) -> Ints:
        """Return addresses [n] in RAM; if rows are reused, first wait for the copies that still read them."""
        if not self._ram.whole:
            self._ready[(self._sent - 1) % ZONES].synchronise()
        return self._ram.addresses(layer * self._ram.table.experts + experts, now=now)


def on_gpu(numbers: Ints, device: torch.device) -> Tensor:
    """Copy to the GPU without synchronising the stream: CUDA has read pageable memory once the call returns."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)
