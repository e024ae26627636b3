"""Serves the GPU's requests for records in the middle of a step: a thread that polls a mailbox in pinned memory.

It makes no CUDA call. While it serves, no other thread fetches (see RamTier).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from offmoe.errors import OffmoeError
from offmoe.kernels.mailbox import ADDRESSES, COUNT, ERROR, RECORDS, answer_word, mailbox_words
from offmoe.machine.pinned_memory import host_memory, register, unregister

Ints = np.ndarray[Any, np.dtype[np.integer]]
Addresses = Callable[[Ints, float], Ints]  # records of one layer [n], until (of time.monotonic) → addresses [n] int64
ANSWER_S = 1.5  # the GPU gives up after 2 s: answering earlier keeps the reason for the user
LOOK_S = 20e-6  # between two polls
SWITCH_S = 2e-4  # Python's switch interval while serving; by default the engine's thread may hold the GIL for 5 ms


class MissService:
    """A thread that starts with the first answer, and sleeps without polling while it does not serve."""

    def __init__(self, addresses: Addresses, k: int, pin: bool) -> None:
        self.error: OffmoeError | None = None  # error of the last failed request
        self._addresses_of, self._k, self._pin = addresses, k, pin
        self.memory = host_memory(4 * mailbox_words(k)).view(torch.int32)
        if pin:
            register(self.memory)
        self._words = self.memory.numpy()
        self._answer = self._words[answer_word(k) :]
        self._addresses = self._answer[ADDRESSES:][: 2 * k].view(np.int64)
        self._served = 0
        self._wanted, self._polling = threading.Event(), threading.Lock()  # the lock is held during a poll
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve requests inside. None may be under way at the start, nor at the end except one that the GPU gave up."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._words[:] = self._served = 0  # a request given up earlier is not served
        self.error = None
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._wanted.set()
        try:
            yield
        finally:
            self._wanted.clear()
            with self._polling:
                sys.setswitchinterval(interval)

    def close(self) -> None:
        """Stop the thread. Close the disk reader first: the thread may be waiting for it."""
        if self._closed:
            return
        self._closed = True
        self._wanted.set()
        if self._thread:
            self._thread.join()
        if self._pin:
            unregister(self.memory)

    def _run(self) -> None:
        while self._wanted.wait() and not self._closed:
            with self._polling:
                if self._wanted.is_set() and (number := int(self._words[0])) != self._served:
                    self._serve(number)
                    self._served = number
            time.sleep(LOOK_S)

    def _serve(self, number: int) -> None:
        """Answer request `number`. The sequence number is stored last: x86 keeps the order of stores."""
        failed = 0
        try:
            records = self._words[RECORDS:][: int(self._words[COUNT])].copy()
            self._addresses[: len(records)] = self._addresses_of(records, time.monotonic() + ANSWER_S)
        except Exception as error:
            failed = 1
            self.error = error if isinstance(error, OffmoeError) else OffmoeError(f"a record did not come: {error!r}")
        self._answer[ERROR] = failed
        self._answer[0] = number
