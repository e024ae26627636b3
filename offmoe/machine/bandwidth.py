"""Bandwidths of this machine in bytes/s, measured once per process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from offmoe.checkpoint.base import ByteRange
from offmoe.machine.disk_reader import PAGE, Reader

MIB = 2**20


@cache
def memory_bandwidth() -> float:
    """RAM read bandwidth in bytes/s, with all of torch's threads."""
    block = torch.ones(128 * MIB // 4)
    return block.nbytes / best_time(block.sum)


@cache
def copy_bandwidth() -> float:
    """RAM copy bandwidth in bytes/s: it stands for the link on the CPU device."""
    source, target = torch.ones(64 * MIB // 4), torch.empty(64 * MIB // 4)
    return source.nbytes / best_time(lambda: target.copy_(source))


@cache
def vram_bandwidth(device: torch.device) -> float:
    """VRAM read bandwidth in bytes/s."""
    block = as_much_as_fits(1024 * MIB, device)
    return block.nbytes / best_time(block.sum, device, repeats=10)


@cache
def pcie_bandwidth(device: torch.device) -> float:
    """Bandwidth of copies from pinned memory to the GPU in bytes/s."""
    target = as_much_as_fits(256 * MIB, device)
    source = torch.ones(target.shape).pin_memory()
    return source.nbytes / best_time(lambda: target.copy_(source, non_blocking=True), device)


def as_much_as_fits(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return float32 ones of `nbytes` bytes, or of half as many and so on down to a sixteenth where memory is short.

    64 MiB of VRAM are partly read from L2: then the bandwidth is too high, which is better than none.
    """
    least = nbytes // 16
    while True:
        try:
            return torch.ones(nbytes // 4, device=device)
        except torch.OutOfMemoryError:
            if nbytes <= least:
                raise
            nbytes //= 2


def slot_bandwidth(device: torch.device) -> float:
    """Read bandwidth of the slots' memory in bytes/s: VRAM, or RAM on the CPU device."""
    return vram_bandwidth(device) if device.type == "cuda" else memory_bandwidth()


def link_bandwidth(device: torch.device) -> float:
    """Bandwidth in bytes/s of the path from RAM to a slot."""
    return pcie_bandwidth(device) if device.type == "cuda" else copy_bandwidth()


@cache
def disk_bandwidth(path: Path) -> tuple[float, bool]:
    """Disk bandwidth in bytes/s, and whether O_DIRECT was possible (without it, the page cache was measured).

    Eight threads read 1 MiB at random offsets of the file, for at most a quarter of a second.
    """
    block = min(MIB, max(PAGE, path.stat().st_size // PAGE * PAGE))
    offsets = list(range(0, max(1, path.stat().st_size - block + 1), block))
    random.Random(0).shuffle(offsets)
    reader, target = Reader([path], threads=8), np.empty((16, block), np.uint8)
    began, moved = time.perf_counter(), 0
    while offsets and time.perf_counter() - began < 0.25:
        batch = [offsets.pop() for _ in range(min(16, len(offsets)))]
        size = min(block, path.stat().st_size)
        reads = [reader.read([ByteRange(0, at, size)], target[i]) for i, at in enumerate(batch)]
        moved += sum(read.done.result() for read in reads)
    seconds = time.perf_counter() - began
    reader.close()
    return moved / seconds, reader.direct


def best_time(run: Callable[[], object], device: torch.device | None = None, repeats: int = 3) -> float:
    """Return the seconds of the fastest of `repeats` runs, after a warm-up run."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
