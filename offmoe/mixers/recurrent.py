"""Recurrent layers: the base of their configs, and the state that they carry instead of keys and values.

A state is the newest inputs of a convolution and, of a DeltaNet, a memory a head. It cannot be rolled back: it is exact
for one number of tokens, `States.at`. A conversation usually diverges a little before the end of a prompt (a chat
template leaves out the reasoning of earlier answers), so snapshots are kept from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from offmoe.checkpoint.base import quote
from offmoe.errors import OffmoeError
from offmoe.mixers.base import MixerConfig

Rule = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # projected, memory, recent, first position → mixed

FULL = "full_attention"  # in layer_types, the kind of all other layers
SNAPSHOTS = 2
STATES = 1 + SNAPSHOTS
BEFORE_END = 32  # tokens of a prompt behind its snapshot
SEGMENT = 512  # tokens that are mixed at once, in float32
NOWHERE = -1


class StateShape(Protocol):
    """Shape of a layer and of its state, as the kernels have it."""

    @property
    def memory(self) -> tuple[int, ...]:
        """Shape of the memory of all heads; (0,): none."""
        ...

    @property
    def taps(self) -> int:
        """Inputs that the convolution sees."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        ...

    @property
    def projected(self) -> tuple[int, ...]:
        """Rows of the input projections."""
        ...

    @property
    def values(self) -> int:
        """Columns of the output projection."""
        ...


@dataclass(frozen=True)
class RecurrentConfig(MixerConfig):
    """A mixer with a state of two parts, float32."""

    @property
    def state_shape(self) -> StateShape:
        raise NotImplementedError

    @property
    def memory(self) -> tuple[int, ...]:
        """Shape of the memory of all heads; (0,): none."""
        return self.state_shape.memory

    @property
    def recent(self) -> tuple[int, int]:
        """[taps, channels] of the convolution's newest inputs; the input of position p is in row p % taps."""
        return self.state_shape.taps, self.state_shape.channels

    @property
    def projected(self) -> int:
        return sum(self.state_shape.projected)

    @property
    def mixed(self) -> int:
        return self.state_shape.values

    @property
    def state_nbytes(self) -> int:
        return 4 * (prod(self.memory) + prod(self.recent))

    @property
    def activations(self) -> int:
        return self.projected + self.mixed

    def chunk_nbytes(self, ctx: int, itemsize: int) -> int:
        """A segment's convolved inputs and its output, in float32."""
        return SEGMENT * 4 * (self.recent[1] + self.mixed)


def layers_of_kind(kinds: Any, layers: int, kind: str) -> tuple[int, ...]:
    """Layers of `kind` in a config's layer_types; all others must be full_attention. Raises OffmoeError."""
    if not isinstance(kinds, list) or len(kinds) != layers or not all(each in (FULL, kind) for each in kinds):
        raise OffmoeError(f"layer_types is {quote(kinds)}: expected {layers} times {kind} or {FULL}")
    if FULL not in kinds:
        raise OffmoeError(f"layer_types has no {FULL}: offmoe needs one")
    return tuple(layer for layer, each in enumerate(kinds) if each == kind)


@dataclass(eq=False)
class Snapshot:
    """State of all recurrent layers after `at` tokens."""

    memory: Tensor
    recent: Tensor
    at: int = NOWHERE


class States:
    """State of all recurrent layers, float32: memory [layers, heads, K, V] or [layers, 0], recent [layers, taps, C]."""

    def __init__(self, configs: Sequence[RecurrentConfig], device: torch.device, block: int = 1) -> None:
        """`block`: as of trunk.kv_cache.KVCache."""
        shapes = {(config.memory, config.recent) for config in configs}
        assert len(shapes) == 1, "recurrent layers of one model are alike"
        ((memory, recent),) = shapes

        def zeros() -> tuple[Tensor, Tensor]:
            layers = len(configs)
            return torch.zeros((layers, *memory), device=device), torch.zeros((layers, *recent), device=device)

        self.memory, self.recent = zeros()
        self.at = 0  # tokens that it covers; NOWHERE: not all layers cover the same
        self._snapshots = [Snapshot(*zeros()) for _ in range(SNAPSHOTS)]  # the one used last is the last
        self._snapshot_at = NOWHERE  # tokens after which the running chunk takes a snapshot
        self._segment = SEGMENT
        self._block = block

    def begin(self, start: int, count: int) -> None:
        """Prepare for `count` tokens from position `start` on, which all layers run next."""
        self.at = NOWHERE
        at = start + max(0, count - BEFORE_END)
        if self._block > 1:
            at = (start + count - min(BEFORE_END, self._block)) // self._block * self._block
        known = any(snapshot.at == at for snapshot in self._snapshots)
        self._snapshot_at = NOWHERE if count == 1 or at <= 0 or at < start or known else at
        if self._snapshot_at != NOWHERE:
            self._oldest()

    def ended(self) -> None:
        """Keep the state at the end of a prompt, which is continued if the prompt comes again."""
        if self._block > 1 and all(snapshot.at != self.at for snapshot in self._snapshots):
            snapshot = self._oldest()
            snapshot.memory.copy_(self.memory)
            snapshot.recent.copy_(self.recent)
            snapshot.at = self.at

    def end(self, at: int) -> None:
        """Note that all layers cover `at` tokens."""
        self.at = at
        if self._snapshot_at != NOWHERE:
            self._snapshots[-1].at, self._snapshot_at = self._snapshot_at, NOWHERE

    def mix(self, index: int, projected: Tensor, mixed: int, start: int, rule: Rule) -> Tensor:
        """Run a chunk [T, P] through recurrent layer `index`, a segment at a time: [T, mixed] in its type."""
        out = projected.new_empty((len(projected), mixed))
        end = start + len(projected)
        snapshot = {self._snapshot_at} if start <= self._snapshot_at < end else set()
        at = start
        for stop in sorted({*range(start, end, self._segment), end} | snapshot):
            if stop > at:
                part = slice(at - start, stop - start)
                out[part] = rule(projected[part], self.memory[index], self.recent[index], at)
            at = stop
            if at == self._snapshot_at:
                self._snapshots[-1].memory[index].copy_(self.memory[index])
                self._snapshots[-1].recent[index].copy_(self.recent[index])
        return out

    def resume(self, common: int, most: int) -> int:
        """Restore the newest state that can be continued, of at most `most` tokens; return of how many.

        What covers more than the `common` tokens is forgotten.
        """
        for snapshot in self._snapshots:
            if snapshot.at > common:
                snapshot.at = NOWHERE
        at = max((at for at in self._covered() if at <= most and at % self._block == 0), default=NOWHERE)
        if at == NOWHERE:
            self.memory.zero_()
            self.recent.zero_()
            self.at = 0
        else:
            self.restore(at)
        return self.at

    def restore(self, at: int) -> bool:
        """Restore the state after `at` tokens; return whether there is one."""
        if self.at == at:
            return True
        for snapshot in self._snapshots:
            if snapshot.at == at:
                self._snapshots.remove(snapshot)
                self._snapshots.append(snapshot)
                self.memory.copy_(snapshot.memory)
                self.recent.copy_(snapshot.recent)
                self.at = at
                return True
        return False

    def _covered(self) -> list[int]:
        """Return the numbers of tokens that the state and its snapshots cover."""
        return [at for at in (self.at, *(snapshot.at for snapshot in self._snapshots)) if at != NOWHERE]

    def _oldest(self) -> Snapshot:
        """Return the snapshot used longest ago, emptied, as the newest."""
        self._snapshots.append(self._snapshots.pop(0))
        self._snapshots[-1].at = NOWHERE
        return self._snapshots[-1]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Restore the state on exit; meanwhile a copy waits in the host's memory."""
        memory, recent = (tensor.to("cpu", copy=True) for tensor in (self.memory, self.recent))
        at = self.at
        try:
            yield
        finally:
            self.memory.copy_(memory)
            self.recent.copy_(recent)
            self.at = at


@dataclass(frozen=True)
class LayerState:
    """One layer's part of `States`: its cache, as far as a mixer sees."""

    states: States
    index: int  # among the recurrent layers

    @property
    def memory(self) -> Tensor:
        return self.states.memory[self.index]

    @property
    def recent(self) -> Tensor:
        return self.states.recent[self.index]

    def tensors(self) -> list[Tensor]:
        return [self.memory, self.recent]

    def mix(self, projected: Tensor, mixed: int, start: int, rule: Rule) -> Tensor:
        """See States.mix."""
        return self.states.mix(self.index, projected, mixed, start, rule)

    def lost(self, position: int, written: int) -> bool:
        """False: `States.resume` decides what can be continued."""
        return False
