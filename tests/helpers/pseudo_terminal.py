"""A program in a pseudo-terminal whose screen is emulated, driven as a person would."""

from __future__ import annotations

import os
import re
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte

from offmoe.app.prompt import HINT

ENTER = "\r"
PATIENCE_S = 60  # for a slow machine; nothing waits that long otherwise


class Screen:
    """`program` in a pseudo-terminal, and the text on its screen."""

    def __init__(self, program: list[str], home: Path, columns: int = 120, rows: int = 60, **environment: str) -> None:
        sizes = "COLUMNS", "LINES"  # pytest-xdist sets them
        kept = {name: value for name, value in os.environ.items() if name not in sizes}
        all_of_it = {**kept, "XDG_STATE_HOME": str(home), "TERM": "xterm-256color", **environment}
        self.raw = ""  # everything that the program wrote
        self.child = pexpect.spawn(program[0], program[1:], env=all_of_it, dimensions=(rows, columns), encoding="utf-8")
        self.settings = termios.tcgetattr(self.child.child_fd)
        self.screen = pyte.Screen(columns, rows)
        self.screen.write_process_input = self.child.send  # pyte reports the cursor's position
        self.stream = pyte.Stream(self.screen)

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def wait(self, seen: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not seen():
            assert time.monotonic() < deadline, self.text()
            try:
                self.feed(self.child.read_nonblocking(4096, timeout=1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert seen(), self.text()

    def feed(self, text: str) -> None:
        self.raw += text
        self.stream.feed(text)

    def see(self, pattern: str) -> None:
        self.wait(lambda: re.search(pattern, self.text()))

    def prompted(self) -> bool:
        """Return whether the cursor is at an empty prompt, perhaps behind the ^C of a key pressed just before it."""
        cursor = self.screen.cursor
        line = self.screen.display[cursor.y].rstrip()
        echoed = len(line) - len(line.removeprefix("^C"))
        return cursor.x == 2 + echoed and line[echoed:] in ("›", f"› {HINT}"[: self.screen.columns - echoed])

    def say(self, text: str) -> None:
        self.wait(self.prompted)
        self.child.send(text + ENTER)
        self.see(re.escape(f"› {text}"))

    def ended(self) -> int:
        """Wait for the end of the program; return its exit code."""
        self.wait(lambda: not self.child.isalive())
        self.drain()
        self.final_settings = termios.tcgetattr(self.child.child_fd)
        self.child.close()
        assert self.child.exitstatus is not None, f"signal {self.child.signalstatus}"
        return int(self.child.exitstatus)

    def drain(self) -> None:
        """Read what the program wrote at its end."""
        try:
            while True:
                self.feed(self.child.read_nonblocking(4096, timeout=0))
        except (pexpect.EOF, pexpect.TIMEOUT):
            pass

    def restored(self) -> bool:
        """Return whether the terminal's settings are as before, and no mode that the program switched on is left."""
        modes = {"\x1b[?2004h": "\x1b[?2004l", "\x1b[?25l": "\x1b[?25h", "\x1b[2m": "\x1b[0m"}
        return self.final_settings == self.settings and all(
            self.raw.rfind(on) <= self.raw.rfind(off) for on, off in modes.items()
        )

    def leave(self) -> int:
        self.wait(self.prompted)
        self.child.sendeof()
        return self.ended()
