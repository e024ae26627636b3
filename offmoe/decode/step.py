"""One decoded token as a sequence of launches: what the graph captures, and what tests run through the interpreter.

A layer is six nodes: three for its mixer (`mixing.py`) and three for its experts (`experts.py`); more where attention
is latent, experts are shared or norms stand around the parts. Nothing here allocates, waits or reads a tensor on the
host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from offmoe.decode.buffers import StepBuffers
from offmoe.decode.device_table import device_table, lose, pull, push, reach
from offmoe.decode.experts import ExpertsStep
from offmoe.decode.mixing import MixingStep
from offmoe.decode.variant import Variant
from offmoe.experts.vram_store import VramStore
from offmoe.kernels.gpu.advance import advance
from offmoe.kernels.gpu.embed import embed
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.gpu.sample import FULL, Scratch, sample_step
from offmoe.kernels.ring import ABORTED, DONE, Ring, row_words
from offmoe.machine.pinned_memory import host_memory, register, unregister
from offmoe.mixers.recurrent import NOWHERE
from offmoe.plan import Plan
from offmoe.trunk.device_trunk import DeviceTrunk
from offmoe.trunk.kv_cache import KVCache

RING_ROWS = 64  # many more than tokens are ever under way


class DecodeStep:
    """Launches of one token over static buffers; on the CPU, in tests, Triton interprets the same launches."""

    def __init__(self, plan: Plan, trunk: DeviceTrunk, store: VramStore, kv: KVCache) -> None:
        self.config, self.plan, self.trunk, self.store, self.kv = trunk.config, plan, trunk, store, kv
        c, device = self.config, plan.device
        self.pdl = pdl_supported(device)
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        self.buffers = StepBuffers(c, device)
        self.gate = plan.prefetch.within(store.table, c.top_k)
        self.table = device_table(store.table, reach(store.table, c.top_k, self.gate.most), device)
        self.routed = c.moe_layers * c.top_k  # records a step, at most
        self.sampler = Scratch.of(c.vocab, device)
        words = row_words(self.routed)
        memory = host_memory(RING_ROWS * words * 4).view(torch.int32).view(RING_ROWS, words)
        self._pinned = [memory] if device.type == "cuda" else []
        for tensor in self._pinned:
            register(tensor)
        self.ring = Ring(memory, c.moe_layers, c.top_k)
        self.mixing = MixingStep(trunk, kv, self.buffers, sms, self.pdl)
        self.experts = ExpertsStep(plan, trunk, store, self.buffers, self.table, self.gate, self.pdl)

    def launch(self, variant: Variant) -> None:
        """Run the token in `buffers.token` at `buffers.position`, and choose the next one."""
        b, c = self.buffers, self.config
        embed(b.token, self.trunk.embedding, b.x, striped=True, scale=c.stream_scale)
        self.experts.begin()
        for layer in range(c.layers):
            self.mixing.launch(layer)
            self.experts.launch(layer, variant)
        self.trunk.logits_into(b.x, b.normed, b.logits, self.pdl)
        self.choose(variant, self.pdl)

    def choose(self, variant: Variant, pdl: bool = False) -> None:
        """Sample from `buffers.logits`, advance all clocks, tell the host."""
        b = self.buffers
        sample_step(
            b.logits[0], b.params, b.seed, b.steps, b.seen, b.status, b.chosen, self.sampler,
            variant=variant.sampler, pdl=pdl and variant.sampler != FULL,
        )  # fmt: skip
        advance(
            b.chosen, token=b.token, position=b.position, clock=self.table.clock, steps=b.steps, status=b.status,
            remaining=b.remaining, eos=b.eos, counters=b.counters, ids=b.log, ring=self.ring.address,
            rows=self.ring.rows, pdl=pdl and variant.sampler != FULL,
        )  # fmt: skip

    def push(self, clock: int, position: int) -> None:
        """Copy residency to the device; `position` is that of the next token. Steps count from 0 again.

        The first `choose` advances token number and position without a step before it.
        """
        push(self.store.table, self.table, clock)
        self.kv.stepped(NOWHERE)  # until `pull`
        b = self.buffers
        b.position.fill_(position - 1)
        b.status.zero_()
        b.steps.zero_()
        b.counters.zero_()
        b.fetch_count.zero_()
        self.ring.clear()

    def pull(self) -> int:
        """Copy residency back to the host, once nothing runs any more; return the number of the last token."""
        token = pull(self.store.table, self.table) - 1
        position, aborted = int(self.buffers.position), int(self.buffers.status) == ABORTED
        self.kv.wrote(position)
        self.kv.stepped(NOWHERE if aborted else position)
        if aborted:
            lose(self.store.table, self.buffers.miss_records, self.buffers.miss_slots)
        return token

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Launches inside change nothing, as if the answer were over and the context full: no key is written, no
        state changes."""
        b = self.buffers
        status, position = b.status.clone(), b.position.clone()
        b.status.fill_(DONE)
        b.position.fill_(self.plan.ctx)
        yield
        b.status.copy_(status)
        b.position.copy_(position)

    def close(self) -> None:
        for tensor in self._pinned:
            unregister(tensor)
        self._pinned.clear()
