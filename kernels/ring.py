"""What a decoded step tells the host: rows of int32 in pinned memory, written by the GPU, read behind it.

Step s (from 0) owns row s % rows. Its sequence number s + 1 is stored last, after a fence that reaches the host, so
a row with it is whole. The host must have read step s before step s + rows is launched.

| words | what |
|---|---|
| 0 | sequence number: step + 1 |
| 1 | status after the step: RUN, DONE (an end token, or enough of them) or ABORTED |
| 2 | the chosen token, -1: NaN in the logits, or aborted |
| 3 | unused |
| 4, 5 | the GPU's clock in ns, int64 |
| 6, 7 | unused |
| 8 … 15 | counters of the step |
| 16 … | the log: ids in the order of layers and ranks |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RUN, DONE, ABORTED = 0, 1, 2
SEQUENCE, STATUS, TOKEN, STAMP, COUNTERS, LOG = 0, 1, 2, 4, 8, 16
COUNTED = LOG - COUNTERS


@dataclass(frozen=True)
class Row:
    """One step, copied out of the ring."""

    step: int
    status: int
    token: int
    stamp_ns: int
    counters: NDArray[np.int32]  # [COUNTED]
    log: NDArray[np.int32]


def row_words(log: int) -> int:
    """int32 words of a row with a log of `log` words: whole lines of 64 bytes."""
    return -(-(LOG + log) // 16) * 16


class Ring:
    """The host's view of `memory` [rows, row_words(log)] int32, pinned where a GPU writes it."""

    def __init__(self, memory: Tensor, log: int) -> None:
        assert memory.dtype == torch.int32
        assert memory.is_contiguous()
        assert memory.shape[1] == row_words(log)
        self.memory, self.log = memory, log
        self._rows = memory.numpy()

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    def clear(self) -> None:
        """Before a new count of steps begins, with no step under way."""
        self.memory.zero_()

    def read(self, step: int) -> Row | None:
        """Step `step`, or None while it has not arrived."""
        row = self._rows[step % len(self._rows)]
        if int(row[SEQUENCE]) != step + 1:
            return None
        return Row(
            step=step,
            status=int(row[STATUS]),
            token=int(row[TOKEN]),
            stamp_ns=int(row[STAMP : STAMP + 2].view(np.int64)[0]),
            counters=row[COUNTERS:LOG].copy(),
            log=row[LOG : LOG + self.log].copy(),
        )
