"""Bandwidths of this machine, measured once a process, in bytes a second."""

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
    """Of plain reads by all threads that torch uses."""
    block = torch.ones(128 * MIB // 4)
    return block.nbytes / best_time(block.sum)


@cache
def copy_bandwidth() -> float:
    """Of copies within memory: what stands for the link on the CPU device."""
    source, target = torch.ones(64 * MIB // 4), torch.empty(64 * MIB // 4)
    return source.nbytes / best_time(lambda: target.copy_(source))


@cache
def vram_bandwidth(device: torch.device) -> float:
    """Of plain reads by the GPU."""
    block = as_much_as_fits(1024 * MIB, device)
    return block.nbytes / best_time(block.sum, device, repeats=10)


@cache
def pcie_bandwidth(device: torch.device) -> float:
    """Of copies from pinned memory to the GPU."""
    target = as_much_as_fits(256 * MIB, device)
    source = torch.ones(target.shape).pin_memory()
    return source.nbytes / best_time(lambda: target.copy_(source, non_blocking=True), device)


def as_much_as_fits(nbytes: int, device: torch.device) -> torch.Tensor:
    """So many bytes of float32 ones or, where there is no room for them beside a model, a half, down to a sixteenth:
    64 MiB of VRAM are partly read from L2, and the figure is too high rather than none."""
    least = nbytes // 16
    while True:
        try:
            return torch.ones(nbytes // 4, device=device)
        except torch.OutOfMemoryError:
            if nbytes <= least:
                raise
            nbytes //= 2


def slot_bandwidth(device: torch.device) -> float:
    """Of reads from where slots lie: VRAM, or memory on the CPU device."""
    return vram_bandwidth(device) if device.type == "cuda" else memory_bandwidth()


def link_bandwidth(device: torch.device) -> float:
    """Of what brings a record from RAM into a slot."""
    return pcie_bandwidth(device) if device.type == "cuda" else copy_bandwidth()


@cache
def disk_bandwidth(path: Path) -> tuple[float, bool]:
    """Of 1 MiB reads all over a file by eight threads, for at most a quarter of a second.

    Also whether O_DIRECT was possible: without it the figure is the page cache's.
    """
    block = min(MIB, max(PAGE, path.stat().st_size // PAGE * PAGE))
    places = list(range(0, max(1, path.stat().st_size - block + 1), block))
    random.Random(0).shuffle(places)
    reader, target = Reader([path], threads=8), np.empty((16, block), np.uint8)
    began, moved = time.perf_counter(), 0
    while places and time.perf_counter() - began < 0.25:
        batch = [places.pop() for _ in range(min(16, len(places)))]
        size = min(block, path.stat().st_size)
        reads = [reader.read([ByteRange(0, at, size)], target[i]) for i, at in enumerate(batch)]
        moved += sum(read.done.result() for read in reads)
    seconds = time.perf_counter() - began
    reader.close()
    return moved / seconds, reader.direct


def best_time(run: Callable[[], object], device: torch.device | None = None, repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats` runs, after one that does not count."""
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
