"""Signals: Ctrl-C ends an answer, SIGTERM and SIGHUP end the program in order, Ctrl-Z suspends it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from offmoe.app.echo import echo

PATIENCE_S = 3.0  # a Ctrl-C this long after the first one does not wait for the end of the step any more
ENDING = signal.SIGTERM, signal.SIGHUP


class Terminated(BaseException):
    """Raised by SIGTERM or SIGHUP; the program's exit code is 128 + `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


@contextmanager
def handlers(chosen: dict[signal.Signals, Callable[[int, FrameType | None], Any]]) -> Iterator[None]:
    """Install signal handlers while the block runs. A signal that is ignored (`nohup`) stays ignored, and outside the
    main thread, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {
        signum: signal.signal(signum, handler)
        for signum, handler in chosen.items()
        if signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated on SIGTERM and SIGHUP while the block runs, so that drafts of files are removed."""
    received: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> NoReturn:
        received.append(signum)
        raise Terminated(signum)

    with handlers(dict.fromkeys(ENDING, on_signal)):
        try:
            yield
        except Exception:
            if received:  # an error on the way out, such as a write to a terminal that is gone
                raise Terminated(received[0]) from None
            raise


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """Make Ctrl-C call `stop`, so that it does not interrupt a step; one that comes PATIENCE_S after the first raises
    KeyboardInterrupt.
    """
    first = 0.0

    def on_sigint(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first and now - first > PATIENCE_S:
            raise KeyboardInterrupt
        first = first or now
        stop()

    with handlers({signal.SIGINT: on_sigint}):
        yield


class ChatSignals:
    """Signals while a person chats. Ctrl-C ends an answer, never the chat; SIGTERM and SIGHUP end the chat once the
    answer's text is kept. A context manager.
    """

    def __init__(self) -> None:
        self._resumed = False
        self._first = 0.0  # the first Ctrl-C since the last prompt
        self._signum: int | None = None  # the SIGTERM or SIGHUP that ends the chat
        self._stop: Callable[[], None] | None = None  # ends the running answer
        self._paused: Callable[[float], None] | None = None  # learns how long the running answer was suspended
        self._wake: Callable[[BaseException], None] | None = None  # ends the prompt with an exception

    def __enter__(self) -> ChatSignals:
        self._installed = handlers(
            {
                signal.SIGINT: self._on_interrupt,
                **dict.fromkeys(ENDING, self._on_termination),
                signal.SIGTSTP: self._on_suspend,
            }
        )
        self._installed.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._installed.__exit__(None, None, None)
        if kind is not None and issubclass(kind, Exception) and self._signum is not None:
            raise Terminated(self._signum) from None  # not the failed write to a terminal that is gone

    @contextmanager
    def prompting(self, wake: Callable[[BaseException], None]) -> Iterator[None]:
        """Pass signals to `wake` as exceptions while the block waits for input.

        A signal that comes after the input is for the answer to it.
        """
        self._first = 0.0
        self._wake = wake
        try:
            yield
        finally:
            self._wake = None

    def due(self) -> Terminated | None:
        """Return what ends the chat, if SIGTERM or SIGHUP came."""
        return None if self._signum is None else Terminated(self._signum)

    @contextmanager
    def answering(self, stop: Callable[[], None], paused: Callable[[float], None]) -> Iterator[None]:
        """Let Ctrl-C, SIGTERM and SIGHUP call `stop` while the block runs, and at once if one came since the prompt.

        After Ctrl-Z and `fg`, `paused` is called with the time between them in seconds.
        """
        self._stop, self._paused = stop, paused
        try:
            if self._first or self._signum is not None:
                stop()
            yield
        finally:
            self._stop = self._paused = None

    def resumed(self) -> bool:
        """Return whether the program was suspended and resumed since the last call."""
        resumed, self._resumed = self._resumed, False
        return resumed

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._wake:
            self._wake(KeyboardInterrupt())
            return
        now = time.monotonic()
        if self._first and now - self._first > PATIENCE_S:
            raise KeyboardInterrupt
        self._first = self._first or now
        if self._stop:
            self._stop()

    def _on_termination(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            raise Terminated(self._signum)
        self._signum = signum
        if self._wake:
            self._wake(Terminated(signum))
        elif self._stop:
            self._stop()

    def _on_suspend(self, signum: int, frame: FrameType | None) -> None:
        began = time.perf_counter()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        with echo(on=True):
            os.kill(os.getpid(), signal.SIGTSTP)  # returns when the shell resumes the program
        signal.signal(signal.SIGTSTP, self._on_suspend)
        if self._paused:
            self._paused(time.perf_counter() - began)
            self._resumed = True
