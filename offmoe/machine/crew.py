"""Threads that share a long prompt's work on the CPU.

OpenMP divides every single operation and waits at its end for all threads: too often where an expert's product takes
0.1 ms, and for long where another program holds a core. Here a thread takes the next task as soon as it is free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

ROWS = 128  # tokens of a task

_local = threading.local()


@contextmanager
def crew(threads: int) -> Iterator[None]:
    """Inside, `share` divides work among `threads` threads, each of which runs torch with one thread of its own."""
    if threads == 1:
        yield
        return
    with ThreadPoolExecutor(threads, "offmoe-crew", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        _local.pool = pool
        try:
            yield
        finally:
            del _local.pool


def shared() -> bool:
    """Return whether there is a crew."""
    return hasattr(_local, "pool")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [T, K] @ weight [K, N], blocks of rows of it shared unless OpenMP divides it."""
    if len(x) <= ROWS or torch.get_num_threads() > 1:
        return x @ weight
    out = x.new_empty((len(x), weight.shape[1]))
    share(partial(torch.mm, rows, weight, out=part) for rows, part in zip(x.split(ROWS), out.split(ROWS), strict=True))
    return out


def share(tasks: Iterable[Callable[[], object]]) -> None:
    """Run all tasks, in any order; they write to different places. Raises the first error, after all have ended."""
    if not shared():
        for task in tasks:
            task()
        return
    running = [_local.pool.submit(inferred, task) for task in tasks]
    errors = [error for future in running if (error := future.exception())]
    if errors:
        raise errors[0]


@torch.inference_mode()
def inferred(task: Callable[[], object]) -> None:
    """Run a task; inference mode is a thread's own."""
    task()
