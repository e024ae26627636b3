"""Streams and events of one GPU. On the CPU, where tests interpret kernels, all is in order and these do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Event:
    """A point in a lane's work that others can wait for; one that was never set does not hold anybody up."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def set(self) -> None:
        """In the current stream."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """The current stream goes on once the point was reached."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def synchronise(self) -> None:
        """The host goes on once the point was reached."""
        if self._event is not None:
            self._event.synchronize()


class Stream:
    """A stream beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What is launched inside goes into this lane."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield
