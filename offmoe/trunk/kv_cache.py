"""Caches of all layers, the tokens that they cover, and how much of them a new prompt can continue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from offmoe.mixers.recurrent import LayerState, RecurrentConfig, States
from offmoe.models.config import ModelConfig


class KVCache:
    """One cache a layer, reserved at start, as its mixer has it (MixerConfig.cache); `states` of recurrent layers."""

    def __init__(
        self, config: ModelConfig, ctx: int, device: torch.device, dtype: torch.dtype, int8: bool = False
    ) -> None:
        self.ctx = ctx
        self.tokens: list[int] = []  # whose keys and values are written
        recurrent = [mixer for mixer in config.mixers if isinstance(mixer, RecurrentConfig)]
        self.states = States(recurrent, device) if recurrent else None
        self.caches: list[Any] = []  # by layer
        index = 0
        for mixer in config.mixers:
            if self.states and isinstance(mixer, RecurrentConfig):
                self.caches.append(LayerState(self.states, index))
                index += 1
            else:
                self.caches.append(mixer.cache(ctx, device, dtype, int8))
        self._written = 0  # steps have written positions up to here, perhaps over what a ring kept

    @contextmanager
    def extending(self, ids: list[int]) -> Iterator[None]:
        """Cover `ids` too on exit; inside, all layers run them behind the tokens covered so far."""
        if self.states:
            self.states.begin(len(self.tokens), len(ids))
        yield
        self.tokens += ids
        if self.states:
            self.states.end(len(self.tokens))

    def stepped(self, tokens: int) -> None:
        """Note that steps on the device covered `tokens`: more than `self.tokens`, where not all were read."""
        if self.states:
            self.states.at = tokens

    def untouched(self) -> AbstractContextManager[None]:
        """Restore the states on exit; keys and values that steps inside write are behind the tokens covered."""
        return self.states.untouched() if self.states else nullcontext()

    def wrote(self, positions: int) -> None:
        """Note that steps have written positions up to `positions`, whether or not their tokens were read."""
        self._written = max(self._written, positions)

    def pretend(self, count: int) -> None:
        """Count whatever the caches hold as `count` tokens: for benchmarks."""
        self.tokens[:] = [0] * count

    def reuse(self, tokens: list[int]) -> int:
        """Keep the longest common prefix with `tokens` that can be continued; return its length.

        The last of `tokens` is always run again: its logits are needed. Where a layer no longer holds what the next
        token sees, nothing is kept.
        """
        same = 0
        for old, new in zip(self.tokens, tokens[:-1], strict=False):
            if old != new:
                break
            same += 1
        self.wrote(len(self.tokens))
        if any(cache.lost(same, self._written) for cache in self.caches):
            same = 0
        if self.states:
            same = self.states.resume(same)
        del self.tokens[same:]
        if not same:
            self._written = 0
        return same


def kv_nbytes(config: ModelConfig, ctx: int, itemsize: int, int8: bool = False) -> int:
    """Bytes of the keys and values of `ctx` positions."""
    return sum(mixer.cache_nbytes(ctx, itemsize, int8) for mixer in config.mixers)


def state_nbytes(config: ModelConfig) -> int:
    """Bytes of the recurrent layers' state: what a token reads and writes."""
    return sum(mixer.state_nbytes for mixer in config.mixers)
