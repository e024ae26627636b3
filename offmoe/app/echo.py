"""Echo of the terminal: what is typed ahead while an answer is generated would be written into it."""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LOCAL_MODES = 3  # index in termios' list of settings


@contextmanager
def echo(on: bool) -> Iterator[None]:
    """Switch the echo of standard input on or off while the block runs; do nothing if it is no terminal."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (OSError, ValueError, termios.error):
        yield
        return
    changed = list(before)
    changed[LOCAL_MODES] = before[LOCAL_MODES] | termios.ECHO if on else before[LOCAL_MODES] & ~termios.ECHO
    try:
        set_modes(changed)
        yield
    finally:
        set_modes(before)


def set_modes(settings: list[int | list[bytes | int]]) -> None:
    """Apply settings of the terminal, unless it is gone."""
    with suppress(termios.error):
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
