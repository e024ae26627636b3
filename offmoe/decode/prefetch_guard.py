"""Never slower: measures on the running chat whether prefetching pays, and keeps what is faster.

Windows with and without it alternate, so that both see the same text and the same machine; between trials the winner
runs. A loser is tried again ever more rarely, so that what the trials cost stays below one percent.
"""

from __future__ import annotations

from statistics import median

WINDOW = 16  # steps of one window
SETTLE = 3  # of them at its start, which still see the other mode's cache
ROUNDS = 3  # windows of each mode in a trial
HOLD = 2048  # steps between trials; doubled after every trial that prefetching lost
MOST = 1 << 16
GAIN = 0.99  # every window with it must be below this share of every window without: less is noise


class Guard:
    """Ask `use` before a step, tell `observe` its time after it; in order, though steps may be under way."""

    def __init__(self) -> None:
        self.on = False  # outside of trials
        self.trials = 0
        self.ratio: float | None = None  # time with ÷ time without, of the last trial
        self._hold, self._left = HOLD, 0  # steps until the next trial
        self._asked = 0  # of this trial
        self._seen = 0
        self._times: list[list[float]] = []  # by window

    def use(self) -> bool:
        """Whether the next step prefetches."""
        if self._left:
            self._left -= 1
            return self.on
        window, self._asked = self._asked // WINDOW, self._asked + 1
        return window % 2 == 1 if window < 2 * ROUNDS else self.on

    def observe(self, seconds: float) -> None:
        """The next of the steps asked for took so long."""
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
