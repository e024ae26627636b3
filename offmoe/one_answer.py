"""One answer of an engine at a time, and nothing after the engine was closed, whatever thread asks."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from offmoe.errors import OffmoeError

UNDER_WAY = "an answer of this engine is under way: finish it, close() its generator, or cancel() it"
CLOSED = "this engine is closed: load the model again"
WAIT_S = 0.02  # between two attempts to end an answer that another thread runs

Item = TypeVar("Item")


class Running(Iterator[Item], Generic[Item]):
    """The items of a generator, for one thread at a time; nothing runs before the first is asked for."""

    def __init__(self, generator: Generator[Item, None, None]) -> None:
        self._generator, self._turn = generator, threading.RLock()
        self._thread: int | None = None  # inside the generator

    def __next__(self) -> Item:
        with self._turn:
            self._thread = threading.get_ident()
            try:
                return next(self._generator)
            finally:
                self._thread = None

    def close(self) -> None:
        """End the generator, after the item that another thread may be waiting for."""
        with self._turn:
            self._generator.close()

    def close_now(self) -> bool:
        """End the generator unless a thread is inside; return whether it has ended."""
        if self.inside or not self._turn.acquire(blocking=False):
            return False
        try:
            self._generator.close()
        finally:
            self._turn.release()
        return True

    @property
    def inside(self) -> bool:
        """Whether the calling thread is inside the generator."""
        return self._thread == threading.get_ident()


class OneAnswer:
    """Lets one answer or forward pass in at a time. An answer dropped unfinished makes room when it is collected."""

    def __init__(self) -> None:
        self._inside, self._closing = threading.Lock(), threading.RLock()
        self._running: weakref.ref[Running[Any]] | None = None  # the answer begun last
        self._thread: int | None = None  # inside `alone` other than by an answer
        self._cancelled = False  # the answer under way may be ended for the next
        self.closed = False

    @property
    def busy(self) -> bool:
        """Whether an answer, or a forward pass, is under way."""
        return self._inside.locked()

    def check(self) -> None:
        """Raise OffmoeError if the engine is closed or an answer is under way; a cancelled answer is ended."""
        self.check_open()
        if self._inside.locked() and not self._end_cancelled():
            raise OffmoeError(UNDER_WAY)

    def check_open(self) -> None:
        """Raise OffmoeError if the engine is closed."""
        if self.closed:
            raise OffmoeError(CLOSED)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all others out inside. Raises OffmoeError as `check` does."""
        with self._entered():
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None

    def answer(self, items: Callable[[], Iterator[Item]]) -> Running[Item]:
        """Return `items`, which keep all others out from the first one on until their end."""

        def guarded() -> Generator[Item, None, None]:
            with self._entered():
                self._running, self._cancelled = itself, False
                yield from items()

        running = Running(guarded())
        itself = weakref.ref(running)
        return running

    def cancel(self) -> None:
        """Let the next answer in, even if the one under way is never finished. For signal handlers too."""
        self._cancelled = True

    @contextmanager
    def close(self, cancel: Callable[[], None]) -> Iterator[bool]:
        """End what is under way, with `cancel`, and keep all others out for ever; yield False if that was done before.

        Raises OffmoeError if what is under way calls this itself.
        """
        with self._closing:
            if self.closed:
                yield False
                return
            running = self._running() if self._running else None
            if self._thread == threading.get_ident() or (running and running.inside):
                raise OffmoeError("close() was called by the answer under way: cancel() it first, and close afterwards")
            self.closed = True
            while not self._inside.acquire(timeout=WAIT_S):
                cancel()
                running = self._running() if self._running else None
                if running:
                    running.close_now()
            yield True

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self.check()
        if not self._inside.acquire(blocking=False):
            raise OffmoeError(UNDER_WAY)
        try:
            self.check_open()  # again: close() may have come first
            yield
        finally:
            self._inside.release()

    def _end_cancelled(self) -> bool:
        """End an answer that was cancelled and not finished; return whether it has ended."""
        running = self._running() if self._running and self._cancelled else None
        return running is not None and running.close_now()
