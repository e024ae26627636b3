"""KV cache of one layer: keys and values of the tokens so far, in memory reserved at start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offmoe.kernels.kv import KEYS
from offmoe.mixers.cache import bucket, zeros

# Positions that a windowed layer keeps behind its window: the next turn may leave out the last answer's reasoning, and
# up to 14 steps are launched whose tokens nobody reads.
SLACK = 1024


@dataclass(frozen=True)
class Chunk:
    """Keys and values [kv_heads, …, D] of the positions from `first` on; of int8, scales [2, kv_heads, …]."""

    keys: Tensor
    values: Tensor
    scales: Tensor | None
    first: int


class HeadCache:
    """Keys and values [kv_heads, room, D]; position p is at p % room.

    A windowed layer has room for its window and SLACK positions, others for the whole context. In int8 the key and the
    value of each head have a float32 scale a position: `scales` [2, kv_heads, room].
    """

    def __init__(
        self, shape: tuple[int, int, int], ctx: int, device: torch.device, dtype: torch.dtype, int8: bool, *,
        window: int = 0, chunked: bool = False,
    ) -> None:  # fmt: skip
        self.ctx, self.room, self._window, self._chunked = ctx, shape[1], window, chunked
        self.keys, self.values = (zeros(shape, device, torch.int8 if int8 else dtype) for _ in range(2))
        self.scales = zeros((2, *shape[:2]), device, torch.float32) if int8 else None

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, *([] if self.scales is None else [self.scales])]

    def open(self, start: int, count: int) -> Chunk:
        """Memory for `count` keys and values from position `start` on, behind those that the new tokens see.

        It begins at a multiple of KEYS, and of a chunked window, wherever a prompt was cut: what stands before the
        window is masked. Pass it to `close` once they are written.
        """
        if self.room == self.ctx:
            return Chunk(self.keys, self.values, self.scales, 0)
        if self._chunked:
            first = start // self._window * self._window
            unit = math.lcm(self._window, KEYS)
        else:
            first, unit = max(0, start - self._window + 1), KEYS
        first = first // unit * unit
        before = torch.arange(first, start, device=self.keys.device) % self.room

        def staged(kept: Tensor) -> Tensor:
            memory = kept.new_zeros((kept.shape[0], start - first + count, *kept.shape[2:]))
            memory[:, : start - first] = kept[:, before]
            return memory

        scales = None if self.scales is None else torch.stack([staged(scale) for scale in self.scales])
        return Chunk(staged(self.keys), staged(self.values), scales, first)

    def close(self, chunk: Chunk, start: int, count: int) -> None:
        """Keep the newest `room` of the positions that were written into `chunk`."""
        if chunk.keys is self.keys:
            return
        kept = torch.arange(max(start, start + count - self.room), start + count, device=self.keys.device)
        slots, sources = kept % self.room, kept - chunk.first
        self.keys[:, slots], self.values[:, slots] = chunk.keys[:, sources], chunk.values[:, sources]
        if chunk.scales is not None and self.scales is not None:
            self.scales[:, :, slots] = chunk.scales[:, :, sources]

    def bucket(self, length: int) -> int:
        """Positions to read for a context of `length`."""
        return bucket(length, self.ctx)

    def lost(self, position: int, written: int) -> bool:
        """Whether something that a token at `position` sees was overwritten, once `written` positions have been."""
        return self.room < self.ctx and max(0, position - self._window + 1) < written - self.room


def room(window: int, ctx: int) -> int:
    """Positions that a layer keeps."""
    return min(ctx, window + SLACK) if window else ctx
