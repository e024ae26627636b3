"""Reads of byte ranges of the model's files by a few threads, with O_DIRECT where the filesystem allows it.

The engine's thread requests and waits; readers only read and never decide. A demanded read overtakes background reads,
including one queued earlier (`hurry`), and is served between the chunks of one in progress: an expert may have 100 MB.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offmoe.checkpoint.base import ByteRange
from offmoe.errors import OffmoeError

PAGE = 4096  # alignment that O_DIRECT requires of offsets, lengths and addresses
URGENT, BACKGROUND, STOP = 1, 2, 0
CHUNK = 8 << 20  # bytes of one call, and at most of each thread's bounce buffer
CLOSE_S = 5.0  # patience with a silent disk when closing

Transform = Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]


class Read:
    """A read of `ranges` into `target`, one after another; `done` is the number of bytes taken from the disk.

    With a `transform`, the bytes go to a buffer and `transform(raw, target)` writes the target.
    """

    def __init__(
        self,
        ranges: list[ByteRange],
        target: NDArray[np.uint8],
        background: bool = False,
        transform: Transform | None = None,
    ) -> None:
        self.ranges = ranges
        self.background = background  # demanded reads may overtake it
        self.target = target
        self.transform = transform
        self.done: Future[int] = Future()
        self._lock = threading.Lock()
        self._taken = False

    def take(self) -> bool:
        """Return True for the first caller only: a hurried read is in the queue twice."""
        with self._lock:
            first, self._taken = not self._taken, True
        return first


class Reader:
    """Threads that read the files of a checkpoint. `direct`: they bypass the page cache."""

    def __init__(self, files: list[Path], threads: int = 4) -> None:
        self.files = files
        self._fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in files]
        self._direct_fds = [open_direct(path) for path in files]
        self.direct = all(fd is not None for fd in self._direct_fds)
        self._queue: queue.PriorityQueue[tuple[int, int, Read | None]] = queue.PriorityQueue()
        self._order = count()
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def read(
        self,
        ranges: list[ByteRange],
        target: NDArray[np.uint8],
        priority: int = URGENT,
        transform: Transform | None = None,
    ) -> Read:
        """Start a read into `target` [bytes], which must outlive it."""
        read = Read(ranges, target, priority == BACKGROUND, transform)
        self._queue.put((priority, next(self._order), read))
        return read

    def hurry(self, read: Read) -> None:
        """Move a background read ahead of the others."""
        read.background = False
        self._queue.put((URGENT, next(self._order), read))

    def close(self) -> None:
        """Stop the threads. Reads that have not begun fail with an error.

        A thread that hangs on a silent disk is abandoned, and its files stay open. Closing twice does nothing: the
        descriptors may be somebody else's by then.
        """
        if self._closed:
            return
        self._closed = True
        self._stop(len(self._threads))
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        while not self._queue.empty():
            if (read := self._queue.get_nowait()[2]) is not None and read.take():
                read.done.set_exception(OffmoeError("the engine was closed while a record was being read"))
        if left := sum(thread.is_alive() for thread in self._threads):
            self._stop(left)
            return
        for fd in (*self._fds, *self._direct_fds):
            if fd is not None:
                os.close(fd)

    def _stop(self, threads: int) -> None:
        for _ in range(threads):
            self._queue.put((STOP, next(self._order), None))

    def _serve(self) -> None:
        bounce = Bounce()
        while (read := self._queue.get()[2]) is not None:
            self._do(read, bounce)

    def _do(self, read: Read, bounce: Bounce) -> None:
        if not read.take():
            return
        try:
            read.done.set_result(self._read(read, bounce))
        except BaseException as error:
            read.done.set_exception(error)

    def _read(self, read: Read, bounce: Bounce) -> int:
        if read.transform is None:
            return self._read_into(read.target, read, bounce)
        raw = np.empty(sum(wanted.nbytes for wanted in read.ranges), np.uint8)
        moved = self._read_into(raw, read, bounce)
        read.transform(raw, read.target)
        return moved

    def _read_into(self, target: NDArray[np.uint8], read: Read, bounce: Bounce) -> int:
        at = moved = 0
        for wanted in read.ranges:
            for offset in range(0, wanted.nbytes, CHUNK):
                nbytes = min(CHUNK, wanted.nbytes - offset)
                moved += self._read_chunk(wanted.file, target[at : at + nbytes], wanted.offset + offset, bounce)
                at += nbytes
                if read.background:
                    self._let_pass(bounce)
        return moved

    def _read_chunk(self, file: int, target: NDArray[np.uint8], offset: int, bounce: Bounce) -> int:
        direct = self._direct_fds[file]
        try:
            if direct is not None:
                return read_direct(direct, target, offset, bounce)
            return read_fully(self._fds[file], target.data, offset, target.size)
        except OSError as error:
            raise OffmoeError(f"reading {self.files[file]} failed: {error.strerror or error}") from None

    def _let_pass(self, bounce: Bounce) -> None:
        """Serve demanded reads that were queued in the meantime."""
        while not self._queue.empty():
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if item[0] != URGENT or item[2] is None:
                self._queue.put(item)
                return
            self._do(item[2], bounce)


class Bounce:
    """A thread's page-aligned buffer: in a GGUF, an expert starts and ends anywhere in a page."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def of(self, nbytes: int) -> NDArray[np.uint8]:
        if self._memory.size < nbytes:
            self._memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        return self._memory[:nbytes]


def open_direct(path: Path) -> int | None:
    """Return a descriptor that bypasses the page cache, or None where the filesystem refuses (tmpfs, some FUSE)."""
    fd = None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        os.preadv(fd, [mmap.mmap(-1, PAGE)], 0)  # some filesystems refuse only here
    except OSError:
        if fd is not None:
            os.close(fd)
        return None
    return fd


def read_direct(fd: int, target: NDArray[np.uint8], offset: int, bounce: Bounce) -> int:
    """Read the pages that contain `target`'s bytes and copy these; return the number of bytes read."""
    skip = offset % PAGE
    pages = bounce.of(-(-(skip + target.size) // PAGE) * PAGE)
    moved = read_fully(fd, pages.data, offset - skip, skip + target.size)
    target[:] = pages[skip : skip + target.size]
    return moved


def read_fully(fd: int, buffer: memoryview, offset: int, needed: int) -> int:
    """Read at least `needed` bytes into `buffer`; return the number. OSError if the file has shrunk."""
    done = 0
    while done < needed:
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            raise OSError(0, f"it ends at byte {offset + done}: it shrank while in use")
        done += got
    return done
