"""Caches of all layers, the tokens that they cover, and how much of them a new prompt can continue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from offmoe.mixers.recurrent import LayerState, RecurrentConfig, States
from offmoe.models.config import ModelConfig


class KVCache:
    """One cache a layer, reserved at start, as its mixer has it (MixerConfig.cache); `states` of recurrent layers.

    `block`: how a prefix is continued (`reuse`). With 1, wherever two prompts part: for float32, whose rounding changes
    no answer. With more, where a fresh start would have computed the same bits: positions that a prompt's chunks have
    computed, not steps, down to a multiple of `block`, at which chunks may be cut without changing a bit.
    """

    def __init__(
        self, config: ModelConfig, ctx: int, device: torch.device, dtype: torch.dtype, int8: bool = False,
        block: int = 1,
    ) -> None:  # fmt: skip
        self.ctx, self.block = ctx, block
        self.tokens: list[int] = []  # whose keys and values are written
        self._prompt = 0  # of these, the first so many are the last prompt's, or its beginning
        self._logits: Tensor | None = None  # [V] after the last prompt, if all of it was run
        recurrent = [mixer for mixer in config.mixers if isinstance(mixer, RecurrentConfig)]
        self.states = States(recurrent, device, block) if recurrent else None
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
        self._prompt, self._logits = 0, None

    def prompted(self, logits: Tensor | None = None) -> None:
        """Note that all tokens so far are a prompt's, whose chunks have computed them; `logits` [V] after its end."""
        self._prompt, self._logits = len(self.tokens), logits
        if self.states and logits is not None:
            self.states.ended()

    def answered(self, tokens: list[int]) -> Tensor | None:
        """Return the logits [V] after `tokens`, if they are the last prompt again and its end can be continued."""
        count = len(tokens)
        if self._logits is None or count != self._prompt or self.tokens[:count] != tokens:
            return None
        self.wrote(len(self.tokens))
        if self._lost(count) or (self.states and not self.states.restore(count)):
            return None
        del self.tokens[count:]
        return self._logits.clone()

    def reuse(self, tokens: list[int]) -> int:
        """Keep the longest common prefix with `tokens` that can be continued; return its length.

        The last of `tokens` is always run again: its logits are needed. Where a layer no longer holds what the next
        token sees, nothing is kept.
        """
        common = 0
        for old, new in zip(self.tokens, tokens[:-1], strict=False):
            if old != new:
                break
            common += 1
        self.wrote(len(self.tokens))
        same = common if self.block == 1 else min(common, self._prompt) // self.block * self.block
        if self._lost(same):
            same = 0
        if self.states:
            same = self.states.resume(common, same)
        del self.tokens[same:]
        self._prompt, self._logits = min(self._prompt, same), None
        if not same:
            self._written = 0
        return same

    def _lost(self, position: int) -> bool:
        return any(cache.lost(position, self._written) for cache in self.caches)


def kv_nbytes(config: ModelConfig, ctx: int, itemsize: int, int8: bool = False) -> int:
    """Bytes of the keys and values of `ctx` positions."""
    return sum(mixer.cache_nbytes(ctx, itemsize, int8) for mixer in config.mixers)


def state_nbytes(config: ModelConfig) -> int:
    """Bytes of the recurrent layers' state: what a token reads and writes."""
    return sum(mixer.state_nbytes for mixer in config.mixers)
