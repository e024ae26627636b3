"""Echo: recency and frequency, plus the experts that followed when routing looked like the last token's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import Parameter
from offmoe.cache.policies.crf import CRF

NEAREST, AHEAD = 8, 8  # earlier tokens that are listened to, and how many that came after each
UNIT = np.float32(2.0**-12)  # weights are whole numbers of it: their sum stays below 2^24, exact in any order


def weights() -> NDArray[np.int32]:
    """[NEAREST, AHEAD]: 8 ÷ (rank + 1) · 0.75^i, in units of 2^-12; a use that CRF counts fresh weighs 1."""
    table = np.floor(2**15 / np.arange(1, NEAREST + 1)[:, None] * 0.75 ** np.arange(AHEAD))
    return table.astype(np.int32)


class Echo(CRF):
    """Score: CRF's, plus the weights of the earlier tokens that foretell a use of the record.

    Every token leaves a row of bits, the records that it used in all layers; the last w rows are kept. At a token's
    first event the row before it is compared with all older ones: the NEAREST by Hamming distance (ties: the
    youngest) are where routing was like now. The tokens 2 to AHEAD + 1 after each stand for those after this one.
    All of it is known before the token begins, so a device can compute it while the previous token decodes.
    """

    parameters: ClassVar[Mapping[str, Parameter]] = {
        "h": Parameter(default=16, low=1, high=4096),
        "w": Parameter(default=2048, low=16, high=65536),
    }

    def __init__(self, records: int, name: str = "echo:h=16,w=2048", h: int = 16, w: int = 2048) -> None:
        super().__init__(records, name, h)
        self.rows = np.zeros((w, -(-records // 64) * 2), np.int32)  # a ring; bit i of word j: record 32 · j + i
        self.filled = 0  # tokens so far; the last one's row is number filled - 1, modulo w
        self.token = -1
        self.weights = weights()
        self.foretold = np.zeros(records, np.float32)

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        if now != self.token:
            self.foretold = self.foretell()
            self.rows[self.filled % len(self.rows)] = 0
            self.filled += 1
            self.token = now
        row = self.rows[(self.filled - 1) % len(self.rows)]
        np.bitwise_or.at(row, records >> 5, np.left_shift(1, records & 31).astype(np.uint32).view(np.int32))
        self.value[records] = super().score(records, now) + np.asarray(uses, np.float32)
        self.last[records] = now

    def score(self, records: Ints, now: int) -> Numbers:
        return super().score(records, now) + self.foretold[records]

    def resume(self, rows: NDArray[np.int32], filled: int, token: int) -> None:
        """Take over what a device has seen up to `token`."""
        self.rows[:], self.filled, self.token = rows, filled, token
        self.foretold = self.foretell()

    def foretell(self) -> NDArray[np.float32]:
        """Return the foretold score of each record [records] for the tokens after the next; 0 below 3 rows."""
        ages = self.nearest()
        if not ages.size:
            return np.zeros(self.records, np.float32)
        after = ages[:, None] - np.arange(2, AHEAD + 2)  # [n, AHEAD] ages of the tokens that followed
        known = after >= 0
        rows = self.rows[(self.filled - 1 - after[known]) % len(self.rows)]
        used = np.unpackbits(rows.view(np.uint8), axis=1, count=self.records, bitorder="little")
        said: NDArray[np.float32] = self.weights[: len(ages)][known].astype(np.float32) @ used.astype(np.float32)
        return said * UNIT

    def nearest(self) -> Ints:
        """Return the ages (≥ 2, counted back from the last token) of the tokens most like it, most similar first."""
        distance = np.bitwise_count(self.rows.view(np.uint64) ^ self._last_row().view(np.uint64)).sum(
            axis=1, dtype=np.int64
        )
        ages = np.arange(2, min(self.filled, len(self.rows)))
        keys = distance[(self.filled - 1 - ages) % len(self.rows)] * len(self.rows) + ages
        best: Ints = np.sort(np.partition(keys, NEAREST)[:NEAREST] if len(keys) > NEAREST else keys)
        return best % len(self.rows)

    def _last_row(self) -> NDArray[np.int32]:
        row: NDArray[np.int32] = self.rows[(self.filled - 1) % len(self.rows)]
        return row
