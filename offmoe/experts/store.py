"""Routed experts in three tiers: slots in fast memory (VRAM), rows in RAM, the model's file on disk.

Ownership: `table` maps records to slots, `ram` brings missing records, and a subclass holds the slots' memory. All
three change only here and in the decode step, never in both at once (see `Decoder`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.cache.residency import Access, Residency
from offmoe.experts.ram_tier import RamTier
from offmoe.machine.disk_reader import Reader
from offmoe.models.model import Model
from offmoe.plan import Plan

Ints = NDArray[np.integer]
Routed = Callable[[int, Ints, Tensor], None]


@dataclass
class Counters:
    """Sums since the engine was loaded; the difference of two snapshots describes an answer."""

    routed: int = 0  # records requested; an expert counts once a chunk
    hits: int = 0
    covered: int = 0  # hits on records that prefetching brought
    late: int = 0  # misses whose prefetch was still under way
    wasted_bytes: int = 0  # prefetched, then evicted unused
    pcie_bytes: int = 0  # RAM → slots
    nvme_bytes: int = 0  # disk → RAM, in whole pages
    nvme_record_bytes: int = 0  # the same without the pages' other bytes
    stall_s: float = 0.0  # time that steps waited for records

    def since(self, before: Counters) -> Counters:
        return Counters(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})


class ExpertStore(ABC):
    """The routed experts of a model; `apply` runs those of one layer. `layer` counts MoE layers here and below."""

    def __init__(self, model: Model, plan: Plan) -> None:
        config = model.config
        self.table = Residency(
            config.moe_layers, config.experts, plan.slots, plan.policy.make(model.records), plan.scope
        )
        # Biases by MoE layer, if any: gate and up concatenated [E, 2F], down [E, H]. Kernels add them in float32.
        dtype = plan.dtype if plan.device.type == "cpu" else torch.float32
        read = (model.expert_biases(moe_layer) for moe_layer in range(config.moe_layers * config.moe.expert_bias))
        self.biases = [(wide.to(plan.device, dtype), narrow.to(plan.device, dtype)) for wide, narrow in read]
        self.reader = Reader(model.checkpoint.files)
        self.ram = RamTier(model, plan.ram_rows, plan.stride, plan.policy, plan.device.type == "cuda", self.reader)
        self._weighted_input = model.config.moe.weighted_input
        self.routed: Routed | None = None  # called with every layer's ids [T, k] and weights, to record a trace
        self.prompt: list[int] = []  # the tokens of a prompt while it is run, empty while decoding
        self.clock = 0  # tokens so far
        self.counts = Counters()

    @property
    def counters(self) -> Counters:
        disk = self.ram.counts
        return replace(self.counts, nvme_bytes=disk.bytes, nvme_record_bytes=disk.record_bytes)

    def begin(self, tokens: int) -> None:
        """Announce a chunk of `tokens`: `apply` follows once for every MoE layer, in order."""
        self.clock += tokens

    @abstractmethod
    def apply(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return Σ_k weight · expert(x) [T, H] for x [T, H], ids [T, k] (-1: none) and weights [T, k] float32.

        The k products of a token are summed in float32 in the router's order, and an expert's product does not depend
        on the tier that it came from: the sum is the same to the bit whatever was resident.
        """

    def weighted(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and weights; if a weight scales its (single) expert's input, x scaled and weights of 1."""
        return (x * weights.to(x.dtype), torch.ones_like(weights)) if self._weighted_input else (x, weights)

    @abstractmethod
    def preload(self, progress: Callable[[int, int], None]) -> None:
        """Fill the slots with all records, where all fit."""

    def check(self) -> None:
        """Assert the invariants of both tables, and that nothing is under way while the engine is idle."""
        self.table.check()
        self.ram.check()
        assert not self.table.arriving.any(), f"arriving {self.table.arriving.sum()} == 0 while idle"

    def close(self) -> None:
        self.reader.close()
        self.ram.close()

    def access(self, layer: int, experts: Ints, uses: Ints) -> Access:
        """Access the table for one layer's experts, and count hits."""
        access = self.table.access(layer, experts, self.clock, uses)
        self.counts.routed += len(experts)
        self.counts.hits += int(access.hit.sum())
        return access


def grouped(ids: Ints) -> tuple[Ints, Ints, list[Ints]]:
    """Group routed ids [n] (-1: none): the distinct experts, the count of each, and its positions in `ids`."""
    order = np.argsort(ids, kind="stable")
    order = order[np.count_nonzero(ids < 0) :]
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    return ids[order[starts]], np.diff(starts, append=len(order)), np.split(order, starts[1:])
