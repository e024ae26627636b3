"""The guard of prefetching: measures during decoding whether it pays, and keeps the faster mode.

In a trial, windows of steps with and without prefetching alternate, so that both see the same text and machine; between
trials the winner runs. A losing mode is tried ever more rarely: trials cost less than one percent.
"""

from __future__ import annotations

from statistics import median

WINDOW = 16  # steps in a window
SETTLE = 3  # first steps of a window, not counted: they still see the other mode's cache
ROUNDS = 3  # windows of each mode in a trial
HOLD = 2048  # steps between trials; doubled after every trial that prefetching lost
MOST = 1 << 16
GAIN = 0.99  # each window with prefetching must take less than this share of each window without: less is noise


class Guard:
    """Call `use` before each step and `observe` with its time afterwards, in order; steps may overlap."""

    def __init__(self) -> None:
        self.on = False  # whether to prefetch between trials
        self.trials = 0
        self.ratio: float | None = None  # time with ÷ time without prefetching in the last trial
        self._hold, self._left = HOLD, 0  # steps until the next trial
        self._asked = 0  # steps of this trial that `use` was asked for
        self._seen = 0
        self._times: list[list[float]] = []  # seconds of steps, by window

    def use(self) -> bool:
        """Return whether the next step prefetches."""
        if self._left:
            self._left -= 1
            return self.on
        window, self._asked = self._asked // WINDOW, self._asked + 1
        return window % 2 == 1 if window < 2 * ROUNDS else self.on

    def observe(self, seconds: float) -> None:
        """Note the time of the oldest step that was not observed yet."""
        if not self._asked or self._seen >= 2 * ROUNDS * WINDOW:
            return
        window, at = divmod(self._seen, WINDOW)
        self._seen += 1
        if at == 0:
            self._times.append([])
        if at >= SETTLE:
            self._times[window].append(seconds)
        if self._seen == 2 * ROUNDS * WINDOW:
            self._decide()

    def _decide(self) -> None:
        off, on = ([median(times) for times in self._times[which::2]] for which in (0, 1))
        self.ratio = median(on) / median(off)
        self.on = max(on) < GAIN * min(off)
        self._hold = HOLD if self.on else min(2 * self._hold, MOST)
        self.trials += 1
        self._left, self._asked, self._seen = self._hold, 0, 0
        self._times = []
