"""CUDA streams and events of one GPU; on the CPU, where tests interpret kernels in order, they do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Event:
    """A point in a stream's work that other streams can wait for; an event that was never set delays nobody."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def set(self) -> None:
        """Record the event in the current stream."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Make the current stream wait for the event."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def synchronise(self) -> None:
        """Make the host wait for the event."""
        if self._event is not None:
            self._event.synchronize()


class Stream:
    """A stream in addition to the current one."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Launch into this stream inside the context."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield
