"""Expert slots in VRAM, and the experts of a prompt's chunk. (Decoding uses the slots through `decode/experts.py`.)

Resident experts are multiplied from their slots. Absent ones are streamed over the link, ahead of use where a chunk
routes to nearly all of them; those that the policy admits stay. So a prompt leaves the cache as warm as it made it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.experts.store import Counters, ExpertStore, Ints
from offmoe.experts.uploads import Landing, Uploads, on_gpu
from offmoe.kernels.gpu.gemm import Tiles, blocks, combine, expert_mlp, plan_tiles
from offmoe.kernels.gpu.page_in import CHUNK, WARPS, Copies, page_in, scratch_for
from offmoe.kernels.planes import slot_layout
from offmoe.models.model import Model
from offmoe.plan import Plan

Multiply = Callable[[Ints, Ints], None]  # experts [n], and the addresses of their records [n]
PROGRAMS = 256  # of a copy within VRAM: many are needed to saturate its bandwidth, where few saturate the link


class VramStore(ExpertStore):
    """Experts of a GPU. `slot_memory` [slots + batch, stride] uint8: slots, then a stage for records not admitted."""

    def __init__(self, model: Model, plan: Plan) -> None:
        super().__init__(model, plan)
        config = model.config
        self.device = plan.device
        self.layouts = tuple(slot_layout(layout) for layout in model.layouts)
        self.record_bytes = [layout.nbytes for layout in model.layouts]
        self.uploads = Uploads(self.ram, plan.batch, plan.stride, plan.device)
        self.slot_memory = torch.empty(
            (self.table.slots + self.uploads.batch, plan.stride), dtype=torch.uint8, device=plan.device
        )
        self._scratch = scratch_for(plan.device, PROGRAMS * WARPS * CHUNK)
        self._k, self._glu = config.top_k, config.moe.glu
        self._streaming = False
        self._all: list[Tensor] = []  # by MoE layer, addresses of all records [experts], once every record has a slot

    def preload(self, progress: Callable[[int, int], None]) -> None:
        experts = np.arange(self.table.experts)
        for layer in range(self.table.layers):
            self._admit(layer, experts, experts * 0)
            self._stream(layer, experts, lambda *_: None)
            progress(layer + 1, self.table.layers)
        self.counts = Counters()
        slots = self.table.slot_of.reshape(self.table.layers, -1)
        self._all = [on_gpu(self._address(row), self.device) for row in slots]

    def begin(self, tokens: int) -> None:
        """Announce a chunk of `tokens`. If it will route to nearly every expert, stream all absent ones ahead of it."""
        super().begin(tokens)
        self._streaming = tokens * self._k >= 2 * self.table.experts
        self._send_ahead(0)

    def apply(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self._all and not self.routed:
            return self._apply_all(layer, x, ids, weights)
        host_ids = ids.cpu().numpy()  # waits for the router: about 0.1 ms a layer
        if self.routed:
            self.routed(layer, host_ids, weights)
        x, weights = self.weighted(x, weights)
        counts = np.bincount(host_ids[host_ids >= 0], minlength=self.table.experts)
        experts = np.flatnonzero(counts)
        resident = self.table.slot_of[layer * self.table.experts + experts]  # before any is evicted
        self._admit(layer, experts, counts[experts])
        tiles = plan_tiles(ids, self.table.experts, x.dtype)
        out = x.new_empty((ids.numel(), x.shape[1]))

        def multiply(chosen: Ints, sources: Ints) -> None:
            addresses = np.zeros(self.table.experts, np.int64)
            addresses[chosen] = sources
            self._multiply(layer, x, ids, tiles, on_gpu(addresses, self.device), out)

        there = resident >= 0
        if there.any():
            multiply(experts[there], self._address(resident[there]))
        self._stream(layer, experts[~there], multiply)
        return combine(out, weights)

    def _apply_all(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Multiply with every record resident: nothing can miss, so the host neither counts nor waits for routing."""
        x, weights = self.weighted(x, weights)
        out = x.new_empty((ids.numel(), x.shape[1]))
        self._multiply(layer, x, ids, plan_tiles(ids, self.table.experts, x.dtype), self._all[layer], out)
        return combine(out, weights)

    def _multiply(self, layer: int, x: Tensor, ids: Tensor, tiles: Tiles, addresses: Tensor, out: Tensor) -> None:
        biases = self.biases[layer] if self.biases else None
        expert_mlp(x, ids, tiles, addresses, self.layouts[layer], out, glu=self._glu, biases=biases)

    def compile(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Launch each kernel that `apply` may launch, for chunks of every length. Inside compiled_at_once none runs."""
        nothing = torch.zeros(self.table.experts, dtype=torch.int64, device=self.device)
        copies = Copies(nothing[:1], nothing, self._scratch, nothing)
        page_in(copies, self.uploads.zones[0])
        page_in(copies, self.slot_memory, self.layouts[layer], programs=PROGRAMS)
        x, weights = self.weighted(x, weights)
        out = x.new_empty((ids.numel(), x.shape[1]))
        for block in blocks(x.dtype):
            self._multiply(layer, x, ids, plan_tiles(ids, self.table.experts, x.dtype, block), nothing, out)
        combine(out, weights)

    def _admit(self, layer: int, experts: Ints, uses: Ints) -> None:
        for order in self.table.waves(layer, experts, uses):
            self.access(layer, experts[order], uses[order])
            # The stream orders later launches after the arrival of these records.
            self.table.landed(np.flatnonzero(self.table.arriving))

    def _stream(self, layer: int, missing: Ints, multiply: Multiply) -> None:
        """Bring `missing` experts in batches, into their slots or through the stage, and multiply each batch."""
        try:
            todo = missing[~self._among(missing, self.uploads.under_way(layer))]
            while len(todo) or self._next(layer):
                todo = self._send(layer, todo)
                if not len(todo):
                    self._send_ahead(layer + 1)
                if self._next(layer):
                    self._place(self.uploads.receive(), missing, multiply)
            self._send_ahead(layer + 1)
        except BaseException:
            self.uploads.drop()
            self._forget(layer, missing)
            raise

    def _next(self, layer: int) -> bool:
        waiting = self.uploads.waiting
        return bool(waiting) and waiting[0].layer == layer

    def _place(self, landing: Landing, missing: Ints, multiply: Multiply) -> None:
        """Move a batch out of its landing zone into slots, rearranged into planes, and multiply it."""
        wanted = self._among(landing.experts, missing)
        experts, sources = landing.experts[wanted], self.uploads.addresses(landing)[wanted]
        n = len(experts)
        slots = self.table.slot_of[landing.layer * self.table.experts + experts].astype(np.int64)
        slots[slots < 0] = self.table.slots + np.arange(np.count_nonzero(slots < 0))
        if n:
            packed = on_gpu(np.concatenate([sources, slots, [n]]), self.device)
            copies = Copies(packed[2 * n :], packed[n : 2 * n], self._scratch, packed[:n])
            page_in(copies, self.slot_memory, self.layouts[landing.layer], programs=PROGRAMS)
        self.uploads.release(landing)
        self.counts.pcie_bytes += self.record_bytes[landing.layer] * len(landing.experts)
        if n:
            multiply(experts, self._address(slots))

    def _send_ahead(self, layer: int) -> None:
        """Fill free landing zones with the absent experts of `layer`, if the chunk will want all of them."""
        if not self._streaming or layer >= self.table.layers:
            return
        first = layer * self.table.experts
        absent = np.flatnonzero(self.table.slot_of[first : first + self.table.experts] < 0)
        self._send(layer, absent[~self._among(absent, self.uploads.under_way(layer))])

    def _send(self, layer: int, todo: Ints) -> Ints:
        """Fill free landing zones with the first experts of `todo`; return the others."""
        while self.uploads.room and len(todo):
            self.uploads.send(layer, todo[: self.uploads.batch], self.clock)
            todo = todo[self.uploads.batch :]
        return todo

    def _among(self, experts: Ints, some: Ints) -> NDArray[np.bool_]:
        """Return which of `experts` [n] are in `some`, in 3 µs (np.isin: 40)."""
        marked = np.zeros(self.table.experts, np.bool_)
        marked[some] = True
        return marked[experts]

    def _forget(self, layer: int, missing: Ints) -> None:
        """Mark all of `missing` absent, after a transfer in which not all of their bytes arrived."""
        records = layer * self.table.experts + missing
        slots = self.table.slot_of[records]
        slots = slots[slots >= 0]
        self.table.arriving[slots] = True
        self.table.abandon(slots)

    def _address(self, slots: Ints) -> Ints:
        return self.slot_memory.data_ptr() + slots.astype(np.int64) * self.slot_memory.stride(0)
