"""What layers without keys and values carry from token to token: the newest inputs and, of a DeltaNet, a memory a head.

Such a state cannot be rolled back. It is exact for one number of tokens, `at`; and for where a conversation usually
turns off, a little before the end of a prompt (a template leaves a past answer's thoughts out), copies are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from offmoe.kernels.recurrent import Mixer, MixerWeights, mix
from offmoe.models.config import ModelConfig

Rule = Callable[[Tensor, MixerWeights, Tensor, Tensor, int], Tensor]

SNAPSHOTS = 2
STATES = 1 + SNAPSHOTS
BEFORE_END = 32  # tokens of a prompt behind its copy
SEGMENT = 512  # tokens that are mixed at once, in float32
NOWHERE = -1


@dataclass(eq=False)
class Snapshot:
    """Of all layers' state behind so many tokens."""

    memory: Tensor
    recent: Tensor
    at: int = NOWHERE


class States:
    """Of all such layers, float32: memory [layers, heads, K, V] or [layers, 0], recent [layers, taps, channels]."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        def zeros() -> tuple[Tensor, Tensor]:
            memory, recent = shapes(config)
            return torch.zeros(memory, device=device), torch.zeros(recent, device=device)

        self.memory, self.recent = zeros()
        self.at = 0  # tokens behind which it stands; NOWHERE: not all layers stand behind the same
        self._snapshots = [Snapshot(*zeros()) for _ in range(SNAPSHOTS)]  # the one used last is the last
        self._mark = NOWHERE  # where a copy is to be taken in the running chunk
        self._segment = SEGMENT

    def begin(self, start: int, count: int) -> None:
        """The layers will now run so many tokens from position `start` on."""
        self.at = NOWHERE
        self._mark = start + max(0, count - BEFORE_END) if count > 1 else NOWHERE
        if self._mark <= 0 or any(snapshot.at == self._mark for snapshot in self._snapshots):
            self._mark = NOWHERE
        else:
            self._snapshots.append(self._snapshots.pop(0))
            self._snapshots[-1].at = NOWHERE

    def end(self, at: int) -> None:
        """All layers stand behind `at` tokens."""
        self.at = at
        if self._mark != NOWHERE:
            self._snapshots[-1].at, self._mark = self._mark, NOWHERE

    def mix(self, index: int, projected: Tensor, weights: MixerWeights, start: int, rule: Rule = mix) -> Tensor:
        """`rule`, mix or its twin, of a chunk in layer `index`, a segment at a time: [T, values] in its type."""
        out = projected.new_empty((len(projected), weights.shape.values))
        end = start + len(projected)
        stops = {*range(start, end, self._segment), end} | ({self._mark} if start <= self._mark < end else set())
        at = start
        for stop in sorted(stops):
            if stop > at:
                part = slice(at - start, stop - start)
                out[part] = rule(projected[part], weights, self.memory[index], self.recent[index], at)
            at = stop
            if at == self._mark:
                self._snapshots[-1].memory[index].copy_(self.memory[index])
                self._snapshots[-1].recent[index].copy_(self.recent[index])
        return out

    def resume(self, same: int) -> int:
        """Go on behind at most `same` of the tokens so far, the others are forgotten; returns behind how many."""
        for snapshot in self._snapshots:
            if snapshot.at > same:
                snapshot.at = NOWHERE
        if NOWHERE < self.at <= same:
            return self.at
        best = max(self._snapshots, key=lambda snapshot: snapshot.at)
        if best.at == NOWHERE:
            self.memory.zero_()
            self.recent.zero_()
            self.at = 0
            return 0
        self._snapshots.remove(best)
        self._snapshots.append(best)
        self.memory.copy_(best.memory)
        self.recent.copy_(best.recent)
        self.at = best.at
        return self.at

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever runs inside, afterwards everything is as before; meanwhile it waits in the host's memory."""
        memory, recent = (tensor.to("cpu", copy=True) for tensor in (self.memory, self.recent))
        at = self.at
        try:
            yield
        finally:
            self.memory.copy_(memory)
            self.recent.copy_(recent)
            self.at = at


def shapes(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of memory and recent."""
    m, layers = config.mixer, len(config.recurrent)
    assert m, f"all layers of {config.model_type} have keys and values"
    return (layers, *m.memory), (layers, m.taps, m.channels)


def state_nbytes(config: ModelConfig) -> int:
    """Of one state: what a token reads and writes."""
    return sum(4 * prod(shape) for shape in shapes(config)) if config.mixer else 0


def segment_nbytes(mixer: Mixer) -> int:
    """That mixing a segment takes for a while on a GPU: its convolved inputs, and what the heads say, in float32."""
    return SEGMENT * 4 * (mixer.channels + mixer.values)
