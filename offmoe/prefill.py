"""Prompts, a chunk at a time, and single tokens on a machine without a GPU: a loop over the layers run by the host.

A layer is attention (`trunk.attend`), routing (`trunk.route`) and its experts (`store.apply`, which brings what is
missing). On a GPU only prompts come this way; tokens are decoded by the captured graph (`decode/graph.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offmoe.errors import ContextFull
from offmoe.experts.store import ExpertStore
from offmoe.kernels import row_blocks
from offmoe.kernels.sandwich import fed
from offmoe.machine.crew import crew
from offmoe.plan import Plan
from offmoe.trunk.host_trunk import Trunk
from offmoe.trunk.kv_cache import KVCache

if TYPE_CHECKING:
    from offmoe.experts.vram_store import VramStore
    from offmoe.trunk.device_trunk import DeviceTrunk

# Multiply-adds of a product below which one thread is faster: the demo's 45-token prompts take half the time of two.
PARALLEL_WORK = 2**29
CREW_TOKENS = 128  # of a chunk whose experts and attention are shared among threads
COMPILED_TOKENS = 16  # compiled code does not depend on the number of tokens, except for tiles of the experts' GEMM


class ForwardPass:
    """All layers over T tokens that follow those in the KV cache."""

    def __init__(self, plan: Plan, trunk: Trunk | DeviceTrunk, store: ExpertStore, kv: KVCache) -> None:
        self.plan, self.trunk, self.store, self.kv = plan, trunk, store, kv
        # Tokens of a pass: chunks may be cut at multiples of the block alone, or the context is one chunk.
        self._chunk = plan.chunk if plan.chunk >= plan.ctx else plan.chunk // kv.block * kv.block
        self.reused = 0  # tokens of the last prompt that the KV cache held already
        # Called with (moe_layer, x): the residual stream x [T, H] that the layer's router sees, before its norm.
        self.watch: Callable[[int, Tensor], None] | None = None

    @torch.inference_mode()
    def prefill(self, ids: list[int], cancelled: Callable[[], bool]) -> Tensor:
        """Run the part of `ids` that the KV cache does not hold; return logits [V] float32 after the last token.

        Stops between two chunks, with the logits of the last one, once `cancelled()`. Raises ContextFull.
        """
        if len(ids) > self.plan.ctx:
            raise ContextFull(len(ids), self.plan.ctx)
        recorded = self.store.routed is not None  # then the prompt's routing is wanted too
        known = None if recorded else self.kv.answered(ids)
        if known is not None:
            self.reused = len(ids)
            return known
        self.reused = start = self.kv.reuse(ids)
        logits = torch.empty(0)
        self.store.prompt = ids[start:]
        try:
            for at in range(start, len(ids), self._chunk):
                if cancelled():
                    break
                logits = self._run(ids[at : at + self._chunk])
                if self.plan.device.type == "cuda":  # launches run ahead of the GPU: wait, so that time and cancel hold
                    torch.cuda.current_stream(self.plan.device).synchronize()
                self.kv.prompted(logits.clone() if len(self.kv.tokens) == len(ids) else None)
        finally:
            self.store.prompt = []
        return logits

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Run one token; return logits [V] float32 after it."""
        return self._run([token])

    def _run(self, ids: list[int]) -> Tensor:
        config, start = self.trunk.config, len(self.kv.tokens)
        self.kv.wrote(start + len(ids))
        self.store.begin(len(ids))
        with threads_for(len(ids) * config.hidden**2, len(ids)), self.kv.extending(ids):
            x = self.trunk.embed(torch.tensor(ids, device=self.plan.device))
            for layer in range(config.layers):
                x = x + self.trunk.attend(layer, x, self.kv, start)
                if self.watch and layer in config.routed:
                    self.watch(config.routed.index(layer), x)
                x = feed_forward(self.trunk, self.store, layer, x)
            return self.trunk.logits(x[-1:])[0]


def block_of(plan: Plan) -> int:
    """Tokens at multiples of which a prompt's beginning is continued (KVCache.block).

    Where arithmetic has 16 bits or keys and values 8, rounding shows: a chunk then begins where its tokens get the bits
    of a fresh start, so that a question has one answer whatever was asked before. On the CPU, whose products depend on
    the number of rows, that is at multiples of a chunk, on a GPU at multiples of ROWS.
    """
    if plan.dtype == torch.float32 and plan.kv != "int8":
        return 1
    return plan.chunk if plan.device.type == "cpu" else min(row_blocks.ROWS, plan.chunk)


def feed_forward(trunk: Trunk | DeviceTrunk, store: ExpertStore, layer: int, x: Tensor) -> Tensor:
    """Return the residual stream [T, H] after the feed-forward part of `layer`, given x [T, H] after its attention."""
    moe_layer, norms = trunk.config.moe_layer_of(layer), trunk.layers[layer].sandwich
    if moe_layer is None:
        return x + trunk.dense(layer, x)
    normed, experts, weights = trunk.route(layer, x)
    shared = trunk.shared(layer, x, normed)
    routed = store.apply(moe_layer, normed, experts, weights)
    if norms and shared is not None:
        return fed(x, shared, routed, norms, trunk.config.stream_eps)
    return x + (routed if shared is None else routed + shared)


@torch.inference_mode()
def compile_prompt_kernels(trunk: DeviceTrunk, store: VramStore, kv: KVCache) -> None:
    """Compile the kernels of a prompt's chunk side by side, so that the first prompt does not wait for each in turn.

    No kernel is launched and no state changes.
    """
    from offmoe.kernels.gpu.launch import compiled_at_once  # imports triton

    config = trunk.config
    tokens = min(COMPILED_TOKENS, kv.ctx)
    start = min(kv.ctx - tokens, max(1, *config.windows))  # after other tokens, with full windows
    with kv.untouched(), compiled_at_once():
        x = trunk.embed(torch.zeros(tokens, dtype=torch.int64, device=store.device)).zero_()
        for layer in range(config.layers):
            trunk.attend(layer, x, kv, start)
            moe_layer = config.moe_layer_of(layer)
            if moe_layer is None:
                trunk.dense(layer, x)
            else:
                normed, ids, weights = trunk.route(layer, x)
                trunk.shared(layer, x, normed)
                store.compile(moe_layer, normed, ids, weights)
        trunk.logits(x[-1:])


@contextmanager
def threads_for(work: int, tokens: int) -> Iterator[None]:
    """Use one thread for products below PARALLEL_WORK, where waiting for other threads costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if work >= PARALLEL_WORK else 1)
    try:
        with crew(before if tokens >= CREW_TOKENS else 1):
            yield
    finally:
        torch.set_num_threads(before)
