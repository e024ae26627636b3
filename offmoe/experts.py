"""Routed experts over the tiers: slots in fast memory, rows in RAM, the model's file.

Who owns what: `table` says which record a slot holds, `slots` holds its bytes, `ram` brings what is missing. All
three change only here, in the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.cache.policy import make_policy
from offmoe.cache.residency import Residency
from offmoe.kernels.feed_forward import swiglu_experts
from offmoe.models.model import Model
from offmoe.plan import Plan
from offmoe.ram import RamTier
from offmoe.slots import PackedSlots, Slots, UnpackedSlots
from offmoe.transfer import Reader

Ints = NDArray[np.integer]
Routed = Callable[[int, Ints, Tensor], None]


@dataclass
class Counters:
    """Sums since the engine was loaded; an answer is the difference of two."""

    routed: int = 0  # records asked for, a chunk's experts counted once
    hits: int = 0
    pcie_bytes: int = 0  # RAM → slots
    nvme_bytes: int = 0  # disk → RAM, in whole pages
    nvme_record_bytes: int = 0  # of these the records' own
    stall_s: float = 0.0  # the step waited for records

    def since(self, before: Counters) -> Counters:
        return Counters(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})


class ExpertStore:
    """`apply` is the whole of a layer's routed part."""

    def __init__(self, model: Model, plan: Plan) -> None:
        config = model.config
        self.layouts = model.layouts
        self.table = Residency(
            config.layers, config.experts, plan.slots, make_policy(plan.policy, model.records), plan.scope
        )
        self.slots = make_slots(model, plan)
        self.reader = Reader(model.checkpoint.files)
        self.ram = RamTier(model, plan.ram_rows, plan.stride, plan.policy, plan.device.type == "cuda", self.reader)
        self.routed: Routed | None = None  # told every layer's ids [T, k] and weights, to record a trace
        self.clock = 0  # tokens so far
        self._counters = Counters()
        if plan.ram_rows >= model.records:
            self.ram.fill()

    @property
    def counters(self) -> Counters:
        disk = self.ram.counts
        return replace(self._counters, nvme_bytes=disk.bytes, nvme_record_bytes=disk.record_bytes)

    def preload(self, progress: Callable[[int, int], None]) -> None:
        """Fill the slots with every record; only where all fit."""
        experts = np.arange(self.table.experts)
        for layer in range(self.table.layers):
            self._ensure(layer, experts, experts * 0)
            progress(layer + 1, self.table.layers)
        self._counters = Counters()

    def apply(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, k], weights [T, k] float32 → Σ_k weight · expert(x) [T, H].

        The k products of a token are summed in float32 in the router's order, and each expert multiplies all of its
        tokens at once: so the sum is the same to the bit whatever is resident and however many waves it takes.
        """
        host_ids = ids.cpu().numpy()
        if self.routed:
            self.routed(layer, host_ids, weights)
        k = host_ids.shape[1]
        experts, uses, pairs = grouped(host_ids.ravel())
        order = self._wave_order(layer, experts, uses)
        if order is not None:
            experts, uses, pairs = experts[order], uses[order], [pairs[i] for i in order]
        flat = torch.from_numpy(np.concatenate(pairs)).to(x.device)
        outputs = torch.cat(
            self._products(layer, x.index_select(0, flat // k).split(uses.tolist()), experts, uses)
        ).float()
        ranked = torch.empty_like(outputs).index_copy_(0, flat, outputs).unflatten(0, (-1, k))
        return (ranked * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def _products(self, layer: int, inputs: Sequence[Tensor], experts: Ints, uses: Ints) -> list[Tensor]:
        """Each expert's product with its inputs, as many experts at a time as there are slots for."""
        products: list[Tensor] = []
        for at in range(0, len(experts), self.table.capacity):
            wave = slice(at, at + self.table.capacity)
            slots = self._ensure(layer, experts[wave], uses[wave])
            for group in self.slots.weights(slots, self.layouts[layer]):
                products += swiglu_experts(inputs[len(products) : len(products) + len(group)], group)
        return products

    def check(self) -> None:
        """The invariants of both tables; nothing may be on its way while the engine is idle."""
        self.table.check()
        self.ram.check()
        assert not self.table.arriving.any(), f"arriving {self.table.arriving.sum()} == 0 while idle"

    def close(self) -> None:
        self.reader.close()
        self.ram.close()

    def _wave_order(self, layer: int, experts: Ints, uses: Ints) -> Ints | None:
        """Where there are more experts than slots: resident ones first, before others evict them, hottest last."""
        if len(experts) <= self.table.capacity:
            return None
        resident = self.table.slot_of[layer * self.table.experts + experts] >= 0
        return np.lexsort((uses, ~resident))

    def _ensure(self, layer: int, experts: Ints, uses: Ints) -> list[int]:
        """Slots that hold these experts, paged in where they were not."""
        access = self.table.access(layer, experts, self.clock, uses)
        self._counters.routed += len(experts)
        self._counters.hits += int(access.hit.sum())
        if not access.hit.all():
            began = time.perf_counter()
            missing = ~access.hit
            self._page_in(layer, experts[missing], access.slots[missing])
            self._counters.stall_s += time.perf_counter() - began
        return access.slots.tolist()

    def _page_in(self, layer: int, experts: Ints, slots: Ints) -> None:
        layout, capacity = self.layouts[layer], self.ram.table.capacity
        try:
            for at in range(0, len(experts), capacity):
                rows = self.ram.fetch(layer, experts[at : at + capacity], self.clock)
                part = torch.from_numpy(slots[at : at + capacity].astype(np.int64))
                self.slots.fill(part, self.ram.rows, rows, layout)
        except BaseException:
            self.table.abandon(slots)
            raise
        self.table.landed(slots)
        self._counters.pcie_bytes += layout.nbytes * len(experts)


def grouped(ids: Ints) -> tuple[Ints, Ints, list[Ints]]:
    """Routed ids, flat → the distinct experts, how often each stands there, and where."""
    order = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    return ids[order[starts]], np.diff(starts, append=len(ids)), np.split(order, starts[1:])


def make_slots(model: Model, plan: Plan) -> Slots:
    if plan.device.type == "cpu":
        return UnpackedSlots(plan.slots, model.layouts[0], plan.dtype)
    return PackedSlots(plan.slots, plan.stride, plan.device, plan.dtype)
