"""Host memory allocated and pinned to the byte: for the RAM tier, and on the CPU for the KV cache."""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.settings import format_size

PIECE = 256 << 20  # bytes pinned in one call, about: a thread that needs another piece may have to wait for this one


def host_memory(nbytes: int) -> Tensor:
    """Return zeroed bytes [nbytes] that take no memory until they are touched. Raises OffmoeError."""
    try:
        return torch.from_numpy(np.frombuffer(mmap.mmap(-1, nbytes), np.uint8))
    except OSError:
        raise OffmoeError(f"the machine refuses {format_size(nbytes)} of memory: lower --ram or --ctx") from None


def register(tensor: Tensor) -> None:
    """Pin (page-lock) host memory for the GPU, to the byte: torch's allocator rounds up to powers of two."""
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(status) != 0:
        raise OffmoeError(
            f"CUDA could not pin {format_size(tensor.nbytes)} of memory (error {int(status)}): lower --ram; "
            "`offmoe doctor` shows the limit"
        )


def unregister(tensor: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


class Pinning:
    """A thread that pins `memory` [rows, stride] piece by piece while other threads fill it.

    A piece is whole rows and whole pages. A copy must not span two pieces, each of which CUDA registers separately.
    """

    def __init__(self, memory: Tensor) -> None:
        rows, stride = memory.shape
        together = math.lcm(stride, mmap.PAGESIZE) // stride  # rows after which a page ends as well
        self.piece_rows = -(-PIECE // (together * stride)) * together
        self.rows: NDArray[np.bool_] = np.zeros(rows, np.bool_)  # pinned rows [rows]; they stay pinned
        self.pieces = 0  # number of pinned pieces
        self.error: OffmoeError | None = None  # once set, nothing more is pinned
        self._parts = memory.split(self.piece_rows)
        self._waiting = deque(range(len(self._parts)))
        self._changed = threading.Condition()
        self._pinned: list[Tensor] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def start(self) -> None:
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def check(self) -> None:
        if self.error:
            raise self.error

    def wait(self, rows: NDArray[np.integer], end: float = math.inf) -> None:
        """Wait until these rows are pinned, at most until `end` (time.monotonic); their pieces are pinned next."""
        if self.rows[rows].all():
            return
        with self._changed:
            for piece in set((rows // self.piece_rows).tolist()).intersection(self._waiting):
                self._waiting.remove(piece)
                self._waiting.appendleft(piece)
            limit = None if end == math.inf else max(0.0, end - time.monotonic())
            self._changed.wait_for(lambda: self.rows[rows].all() or self.error or self._closed, limit)
        if not self.rows[rows].all():
            closed = "the engine was closed while memory was being pinned"
            raise self.error or OffmoeError(closed if self._closed else "CUDA takes too long to pin memory")

    def close(self) -> None:
        """Stop, after the piece that is being pinned, and unpin everything."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        while self._pinned:
            unregister(self._pinned.pop())

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a new thread starts on the first GPU
            while (piece := self._next()) is not None:
                register(self._parts[piece])
                self._pinned.append(self._parts[piece])
                with self._changed:
                    self.rows[piece * self.piece_rows :][: self.piece_rows] = True
                    self.pieces += 1
                    self._changed.notify_all()
        except Exception as error:
            with self._changed:
                self.error = error if isinstance(error, OffmoeError) else OffmoeError(f"pinning memory failed: {error}")
                self._changed.notify_all()

    def _next(self) -> int | None:
        with self._changed:
            return self._waiting.popleft() if self._waiting and not self._closed else None
