"""The ring: rows of int32 in pinned memory by which a decoded step reports to the host.

Step s (from 0) owns row s % rows. Its sequence number s + 1 is stored last, after a fence that reaches the host, so
a row with it is whole. The host must have read step s before step s + rows is launched.

| words | what |
|---|---|
| 0 | sequence number: step + 1 |
| 1 | status after the step: RUN, or DONE: an end token, the last of as many as were asked for, or NaN |
| 2 | the chosen token, -1: NaN in the logits |
| 4, 5 | the GPU's clock in ns, int64 |
| 8 … 15 | counters of the step, in the order of COUNTERS |
| 16 … | routed ids [layers, k], -1: none |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RUN, DONE, ABORTED = 0, 1, 2  # an aborted step writes no row
SEQUENCE, STATUS, TOKEN, STAMP, COUNTED_FROM, IDS = 0, 1, 2, 4, 8, 16
COUNTED = IDS - COUNTED_FROM
COUNTERS = ("hits", "covered", "late", "misses", "wasted", "uploaded")
UPLOADED_UNIT = 16  # bytes: a step may move more than int32 counts


@dataclass(frozen=True)
class Row:
    """One step, copied out of the ring. Counters are records but for `uploaded_bytes`."""

    step: int
    token: int
    done: bool
    stamp: int  # ns
    hits: int
    covered: int
    late: int
    misses: int
    wasted: int
    uploaded_bytes: int
    ids: NDArray[np.int32]  # [layers, k]

    @property
    def routed(self) -> int:
        """Records asked for."""
        return self.hits + self.late + self.misses


def row_words(ids: int) -> int:
    """Return the int32 words of a row with `ids` ids: a multiple of 64 bytes."""
    return -(-(IDS + ids) // 16) * 16


class Ring:
    """The host's view of `memory` [rows, row_words(layers · k)] int32, pinned where a GPU writes it."""

    def __init__(self, memory: Tensor, layers: int, k: int) -> None:
        assert memory.dtype == torch.int32
        assert memory.is_contiguous()
        assert memory.shape[1] == row_words(layers * k)
        self.memory, self._layers, self._k = memory, layers, k
        self._rows = memory.numpy()

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @property
    def rows(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Restart at step 0; no step may be in flight."""
        self.memory.zero_()

    def poll(self, step: int) -> Row | None:
        """Step `step`, or None while it has not arrived."""
        return self.row(step) if int(self._rows[step % self.rows, SEQUENCE]) == step + 1 else None

    def row(self, step: int) -> Row:
        """Step `step`, which has arrived and is not overwritten yet."""
        words = self._rows[step % self.rows]
        assert int(words[SEQUENCE]) == step + 1, f"row of step {words[SEQUENCE] - 1}, expected {step}"
        hits, covered, late, misses, wasted, uploaded = words[COUNTED_FROM:][: len(COUNTERS)].tolist()
        return Row(
            step=step,
            token=int(words[TOKEN]),
            done=int(words[STATUS]) != RUN,
            stamp=int(words[STAMP : STAMP + 2].view(np.int64)[0]),
            hits=hits,
            covered=covered,
            late=late,
            misses=misses,
            wasted=wasted,
            uploaded_bytes=uploaded * UPLOADED_UNIT,
            ids=words[IDS : IDS + self._layers * self._k].reshape(self._layers, self._k).copy(),
        )
