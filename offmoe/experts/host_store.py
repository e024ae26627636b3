"""Expert slots in ordinary memory, for a machine without a GPU: the reference implementation of VramStore."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from offmoe.experts.store import ExpertStore, Ints, grouped
from offmoe.kernels.feed_forward import swiglu_experts
from offmoe.kernels.record import RecordLayout, unpack
from offmoe.machine.crew import share
from offmoe.models.model import Model
from offmoe.plan import Plan

TASK_ROWS = 64  # (token, expert) pairs that are worth another thread
TOGETHER = 4 << 20  # bytes of weights unpacked in one call; they come on top of the budgets


class HostStore(ExpertStore):
    """Experts of a machine without a GPU, multiplied one after another by torch."""

    def __init__(self, model: Model, plan: Plan) -> None:
        super().__init__(model, plan)
        self.layouts = model.layouts
        self.slots = UnpackedSlots(plan.slots, model.layouts[0], plan.dtype)
        self._glu = model.config.moe.glu
        self._memory = torch.empty(0)

    def preload(self, progress: Callable[[int, int], None]) -> None:
        experts = np.arange(self.table.experts)
        for layer in range(self.table.layers):
            self._ensure(layer, experts, experts * 0)
            progress(layer + 1, self.table.layers)
        self.counts = type(self.counts)()

    def apply(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        host_ids = ids.numpy()
        if self.routed:
            self.routed(layer, host_ids, weights)
        x, weights = self.weighted(x, weights)
        experts, uses, pairs = grouped(host_ids.ravel())
        ranked = self._ranked_of(len(x), host_ids.shape[1], x.shape[1])
        ranked.flatten(0, 1)[torch.from_numpy(np.flatnonzero(host_ids < 0))] = 0
        for order in self.table.waves(layer, experts, uses):
            slots = self._ensure(layer, experts[order], uses[order])
            wanted, where = experts[order], [pairs[i] for i in order]
            share(
                partial(self._multiply, layer, x, wanted[some], where[some], slots[some], ranked)
                for some in together(uses[order])
            )
        return torch.bmm(weights.unsqueeze(1), ranked).squeeze(1).to(x.dtype)

    def _multiply(
        self, layer: int, x: Tensor, experts: Ints, pairs: list[Ints], slots: list[int], ranked: Tensor
    ) -> None:
        """Write the products of some experts into ranked [T, k, H], at their (token, choice) pairs."""
        flat = [torch.from_numpy(part) for part in pairs]
        positions, sizes = torch.cat(flat), [len(part) for part in flat]
        inputs = x.index_select(0, positions // ranked.shape[1]).split(sizes)
        biases = self._biases_of(layer, experts) if self.biases else None
        products = swiglu_experts(inputs, self.slots.weights(slots), self._glu, biases)
        rows = ranked.flatten(0, 1)
        for places, product in zip(positions.split(sizes), products, strict=True):
            rows.index_copy_(0, places, product.float())

    def _ranked_of(self, tokens: int, k: int, hidden: int) -> Tensor:
        """Return memory for a product of every pair [T, k, H] float32: the same each time, for new memory is slow."""
        if self._memory.numel() < tokens * k * hidden:
            self._memory = torch.empty(tokens * k * hidden)
        return self._memory[: tokens * k * hidden].view(tokens, k, hidden)

    def _biases_of(self, layer: int, experts: Ints) -> list[tuple[Tensor, Tensor]]:
        gate_up, down = self.biases[layer]
        return [(gate_up[expert], down[expert]) for expert in experts.tolist()]

    def _ensure(self, layer: int, experts: Ints, uses: Ints) -> list[int]:
        """Return the slots of these experts, after paging in the missing ones."""
        access = self.access(layer, experts, uses)
        if not access.hit.all():
            began = time.perf_counter()
            missing = ~access.hit
            self._page_in(layer, experts[missing], access.slots[missing])
            self.counts.stall_s += time.perf_counter() - began
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
        self.counts.pcie_bytes += layout.nbytes * len(experts)


def together(uses: Ints) -> Iterator[slice]:
    """Yield neighbouring experts that are multiplied by one thread, whose rows are at least TASK_ROWS if possible."""
    first = rows = 0
    for last, count in enumerate(uses.tolist(), 1):
        rows += count
        if rows >= TASK_ROWS or last == len(uses):
            yield slice(first, last)
            first, rows = last, 0


class UnpackedSlots:
    """Slots of dequantised weights: a record is unpacked once, on its way in, since misses are rarer than uses."""

    def __init__(self, slots: int, layout: RecordLayout, dtype: torch.dtype) -> None:
        hidden, inner = layout.hidden, layout.expert_hidden
        self._gate_up = torch.empty((slots, 2 * inner, hidden), dtype=dtype)
        self._down = torch.empty((slots, hidden, inner), dtype=dtype)
        self.nbytes = self._gate_up.nbytes + self._down.nbytes
        self._batch = max(1, TOGETHER // (self.nbytes // slots))
        self._ready = list(zip(self._gate_up.mT.unbind(), self._down.mT.unbind(), strict=True))

    def fill(self, slots: Tensor, records: Tensor, rows: Tensor, layout: RecordLayout) -> None:
        """Unpack rows [n] of `records` [R, ≥ nbytes] uint8 into slots [n]; the rows may change afterwards."""
        for some, source in zip(slots.split(self._batch), rows.split(self._batch), strict=True):
            gate_up, down = unpack(records[source], layout, self._gate_up.dtype)
            for slot, *matrices in zip(some.tolist(), gate_up, down, strict=True):  # 3 × as fast as index_copy_
                self._gate_up[slot].copy_(matrices[0])
                self._down[slot].copy_(matrices[1])

    def weights(self, slots: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return for each slot gate and up concatenated [H, 2F], and down [F, H], laid out for `x @ w`."""
        return [self._ready[slot] for slot in slots]
