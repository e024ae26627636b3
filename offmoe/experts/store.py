"""Routed experts over the tiers: slots in fast memory, rows in RAM, the model's file.

Who owns what: `table` says which record a slot holds, `ram` brings what is missing, a subclass holds the slots. All
three change only here and in the decode step, never both at once: see `Decoder`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.cache.policy import make_policy
from offmoe.cache.residency import Access, Residency
from offmoe.experts.ram_tier import RamTier
from offmoe.machine.disk_reader import Reader
from offmoe.models.model import Model
from offmoe.plan import Plan

Ints = NDArray[np.integer]
Routed = Callable[[int, Ints, Tensor], None]


@dataclass
class Counters:
    """Sums since the engine was loaded; an answer is the difference of two."""

    routed: int = 0  # records asked for, a chunk's experts counted once
    hits: int = 0
    covered: int = 0  # of the hits, those that prefetching brought
    late: int = 0
    wasted_bytes: int = 0  # prefetched and evicted unused
    pcie_bytes: int = 0  # RAM → slots
    nvme_bytes: int = 0  # disk → RAM, in whole pages
    nvme_record_bytes: int = 0  # of these the records' own
    stall_s: float = 0.0  # the step waited for records

    def since(self, before: Counters) -> Counters:
        return Counters(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})


class ExpertStore(ABC):
    """`apply` is the whole of a layer's routed part. Here and below `layer` is the place among those with experts."""

    def __init__(self, model: Model, plan: Plan) -> None:
        config = model.config
        self.table = Residency(
            config.moe_layers, config.experts, plan.slots, make_policy(plan.policy, model.records), plan.scope
        )
        # By place, where there are: of all experts gate beside up [E, 2F], down [E, H]. Kernels add them in float32.
        dtype = plan.dtype if plan.device.type == "cpu" else torch.float32
        read = (model.expert_biases(moe_layer) for moe_layer in range(config.moe_layers * config.moe.expert_bias))
        self.biases = [(wide.to(plan.device, dtype), narrow.to(plan.device, dtype)) for wide, narrow in read]
        self.reader = Reader(model.checkpoint.files)
        self.ram = RamTier(model, plan.ram_rows, plan.stride, plan.policy, plan.device.type == "cuda", self.reader)
        self._weighted_input = model.config.moe.weighted_input
        self.routed: Routed | None = None  # told every layer's ids [T, k] and weights, to record a trace
        self.prompt: list[int] = []  # the tokens of a prompt while it is run, empty while decoding
        self.clock = 0  # tokens so far
        self.counts = Counters()

    @property
    def counters(self) -> Counters:
        disk = self.ram.counts
        return replace(self.counts, nvme_bytes=disk.bytes, nvme_record_bytes=disk.record_bytes)

    def begin(self, tokens: int) -> None:
        """A chunk of so many tokens comes: every layer with experts will `apply` once, from the first."""
        self.clock += tokens

    @abstractmethod
    def apply(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, k] (-1: none), weights [T, k] float32 → Σ_k weight · expert(x) [T, H].

        The k products of a token are summed in float32 in the router's order, and what an expert makes of a token
        does not depend on where the expert lay: so the sum is the same to the bit whatever was resident.
        """

    def weighted(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """x and weights as they go on where a weight scales what its one expert takes in."""
        return (x * weights.to(x.dtype), torch.ones_like(weights)) if self._weighted_input else (x, weights)

    @abstractmethod
    def preload(self, progress: Callable[[int, int], None]) -> None:
        """Fill the slots with every record; only where all fit."""

    def check(self) -> None:
        """The invariants of both tables; nothing may be on its way while the engine is idle."""
        self.table.check()
        self.ram.check()
        assert not self.table.arriving.any(), f"arriving {self.table.arriving.sum()} == 0 while idle"

    def close(self) -> None:
        self.reader.close()
        self.ram.close()

    def access(self, layer: int, experts: Ints, uses: Ints) -> Access:
        """One event of the table, counted."""
        access = self.table.access(layer, experts, self.clock, uses)
        self.counts.routed += len(experts)
        self.counts.hits += int(access.hit.sum())
        return access


def grouped(ids: Ints) -> tuple[Ints, Ints, list[Ints]]:
    """Routed ids, flat, -1 where there is none → the distinct experts, how often each stands there, and where."""
    order = np.argsort(ids, kind="stable")
    order = order[np.count_nonzero(ids < 0) :]
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    return ids[order[starts]], np.diff(starts, append=len(order)), np.split(order, starts[1:])
