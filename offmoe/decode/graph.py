"""Decoding on a GPU: one launch of a captured CUDA graph per token.

The host launches up to AHEAD graphs beyond the token that it has read; tokens, routing and counters come back through a
ring in pinned memory. The residency table lives on the device while an answer runs and on the host otherwise: `push`
and `pull` move it, and nothing else touches either meanwhile. A graph keeps no tensor alive: DecodeStep owns them all.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.decode.eager import NAN
from offmoe.decode.prefetch_guard import Guard
from offmoe.decode.step import DecodeStep
from offmoe.decode.variant import Variant
from offmoe.errors import OffmoeError
from offmoe.experts.vram_store import VramStore
from offmoe.kernels.gpu.launch import compiled_at_once
from offmoe.kernels.ring import Row
from offmoe.plan import Plan
from offmoe.settings import Sampling
from offmoe.stats.meter import Meter
from offmoe.trunk.device_trunk import DeviceTrunk
from offmoe.trunk.kv_cache import KVCache

AHEAD = 2  # launches beyond the last token read: the host may lag this far before the GPU idles
FLOOR_STEPS = 12
PATIENCE_S = 20.0  # without a token: the GPU hangs, since a served miss gives up after 2 s


@dataclass(frozen=True)
class Steps:
    """Measurements of a benchmark run, one value per step."""

    seconds: NDArray[np.float64]  # on the GPU's clock, from one token's end to the next one's
    tokens: NDArray[np.int64]
    routed: int  # records a step, at most
    hits: NDArray[np.int64]  # including covered ones
    covered: NDArray[np.int64]
    late: NDArray[np.int64]
    misses: NDArray[np.int64]
    wasted: NDArray[np.int64]
    uploads: NDArray[np.int64]  # records that crossed the link, including prefetched ones


class Decoder:
    """The interface of EagerDecoder, with what benchmarks need besides: force, emulate, run, floor_s."""

    def __init__(self, plan: Plan, trunk: DeviceTrunk, store: VramStore, kv: KVCache) -> None:
        self.plan, self._store, self._kv = plan, store, kv
        self.step = DecodeStep(plan, trunk, store, kv)
        self._graphs: dict[Variant, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(plan.device)
        self._variant = Variant()
        self.guard = Guard() if self.step.gate.most else None
        self._read = 0  # rows of the ring read in this answer
        self._floor: float | None = None
        self._stamp = 0  # GPU clock at the end of the last token, ns
        try:
            self._capture(replace(self._variant, served=self._served()))
        except BaseException:  # release registered memory: reused, it could not be registered again
            self.close()
            raise

    def tokens(
        self, logits: Tensor, ids: list[int], sampling: Sampling, eos: frozenset[int], meter: Meter
    ) -> Generator[int, None, None]:
        """Yield tokens up to one of `eos`, max_tokens, or the end of the context.

        `logits` [V] are those after the prompt `ids`, which the KV cache holds.
        """
        room = self.plan.ctx - len(self._kv.tokens) + 1
        most = min(room, sampling.max_tokens or room)
        with self._answering(logits, ids, sampling, eos, most):
            launched = 0
            before = -1
            for read in range(most):
                launched = self._launch_ahead(launched, read, most - 1)
                row = self._next()
                seconds, self._stamp = (row.stamp - self._stamp) * 1e-9, row.stamp
                if read:
                    self._kv.tokens.append(before)
                    self._count(row, seconds)
                    meter.stepped(seconds, len(self._kv.tokens))
                else:
                    meter.first()
                yield row.token
                if row.done:
                    return
                before = row.token

    def run(self, tokens: int) -> Steps:
        """Run `tokens` greedy steps from the end of the KV cache and measure them; the cache is left as it was."""
        rows: list[Row] = []
        with self._kv.untouched(), self._answering(None, [], Sampling(temperature=0.0), frozenset(), tokens + 1):
            launched = 0
            for _ in range(tokens + 1):
                launched = self._launch_ahead(launched, len(rows), tokens)
                rows.append(self._next())
        return self._steps(rows)

    def force(self, ids: NDArray[np.int16] | None) -> None:
        """Replay routing [tokens, layers, k] from the next run on; None: use the router again."""
        moved = self.step.experts.force(ids)
        self._forget(lambda variant: variant.forced and moved)
        self._variant = replace(self._variant, forced=ids is not None)

    def emulate(self, predicted: NDArray[np.int16] | None) -> None:
        """Replay predictions [tokens, layers, m], padded with −1, with forced routing; None: use the predictor."""
        moved = self.step.experts.emulate(predicted)
        self._forget(lambda variant: variant.emulated and moved)
        self._variant = replace(self._variant, emulated=predicted is not None)

    @property
    def floor_s(self) -> float | None:
        """Measured seconds of a step without misses, at the context that the last answer left."""
        if self._floor is None:
            last = self.step.ring.row(self._read - 1).ids  # [layers, k]: just used, so resident
            before, table, clock = self._variant, copy.deepcopy(self._store.table), self._store.clock
            guard, self.guard = self.guard, None  # prefetched records could evict those that are to hit
            self.force(np.broadcast_to(last, (FLOOR_STEPS + 2, *last.shape)).astype(np.int16))
            try:
                steps = self.run(FLOOR_STEPS + 2)
            finally:
                self.force(None)
                self.guard, self._variant, self._store.table, self._store.clock = guard, before, table, clock
            hits = steps.seconds[2:][steps.misses[2:] + steps.late[2:] == 0]
            self._floor = float(np.median(hits)) if len(hits) else None
        return self._floor

    def close(self) -> None:
        """Release the graphs, then the memory that they point to."""
        if self._graphs:
            torch.cuda.synchronize(self.plan.device)
        self._graphs.clear()
        self.step.close()

    @contextmanager
    def _answering(
        self, logits: Tensor | None, ids: list[int], sampling: Sampling, eos: frozenset[int], most: int
    ) -> Iterator[None]:
        """Move residency, position and sampling to the device and choose the first token; move them back at the end."""
        self._read = 0
        self._variant = replace(self._variant, sampler=self.step.buffers.set_sampling(sampling, ids, eos, most))
        plain = replace(self._variant, served=self._served(), prefetch=self._variant.emulated)
        if plain not in self._graphs:
            self._capture(plain)  # now, not between two tokens
        self.step.push(self._store.clock, len(self._kv.tokens))
        if logits is not None:
            self.step.buffers.logits[0].copy_(logits)
        with nullcontext() if self.plan.all_in_slots else self._store.ram.service():
            self._stream.wait_stream(torch.cuda.current_stream(self.plan.device))
            try:
                with torch.cuda.stream(self._stream):
                    self.step.choose(self._variant)
                yield
            finally:
                self._stream.synchronize()
                self._store.clock = self.step.pull()  # slots that an aborted step may not have filled become empty

    def _launch_ahead(self, launched: int, read: int, most: int) -> int:
        """Launch steps until AHEAD are under way; return the number launched so far."""
        while launched < min(read + AHEAD, most):
            variant = self._next_variant()
            if variant not in self._graphs:
                self._capture(variant)  # the mode has changed since the answer began
            with torch.cuda.stream(self._stream):
                if variant.served:
                    self.step.experts.know_rows()
                self._graphs[variant].replay()
            launched += 1
        return launched

    def _next_variant(self) -> Variant:
        """Return the variant of the next step: no prefetching while records may have to be requested from the host."""
        served = self._served()
        prefetch = not served and (self._variant.emulated or bool(self.guard and self.guard.use()))
        return replace(self._variant, served=served, prefetch=prefetch)

    def _served(self) -> bool:
        """Return whether records may have to be requested from the host."""
        return not (self.plan.all_in_slots or self._store.ram.complete)

    def _capture(self, variant: Variant) -> None:
        """Compile, launch once with the done flag set (which changes nothing), then capture."""
        with torch.cuda.stream(self._stream):
            with self.step.idle():
                with compiled_at_once():
                    self.step.launch(variant)
                self.step.launch(variant)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # other threads pin memory meanwhile: a stricter mode would count that as part of the capture
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self.step.launch(variant)
        self._graphs[variant] = graph

    def _forget(self, which: Callable[[Variant], bool]) -> None:
        for variant in [variant for variant in self._graphs if which(variant)]:
            del self._graphs[variant]

    def _next(self) -> Row:
        """Wait for the next row of the ring and return it. Raises OffmoeError."""
        deadline = time.perf_counter() + PATIENCE_S
        while (row := self.step.ring.poll(self._read)) is None:
            if self._stream.query() and self.step.ring.poll(self._read) is None:
                raise self._aborted()
            if time.perf_counter() > deadline:
                raise OffmoeError(f"the GPU gave no token for {PATIENCE_S:.0f} s: `nvidia-smi` shows whether it hangs")
            time.sleep(20e-6)
        self._read += 1
        if row.token < 0:
            raise OffmoeError(NAN)
        return row

    def _aborted(self) -> OffmoeError:
        """Return the error of steps that were aborted because a record did not arrive."""
        return self._store.ram.service_error() or OffmoeError(
            "a record that the GPU asked for did not come within 2 s: is the disk there? The next answer tries again"
        )

    def _count(self, row: Row, seconds: float) -> None:
        """Add a step's counters to the store's."""
        counts = self._store.counts
        counts.routed += row.routed
        counts.hits += row.hits
        counts.covered += row.covered
        counts.late += row.late
        counts.pcie_bytes += row.uploaded_bytes
        counts.wasted_bytes += row.wasted * self.plan.stride
        if self.guard:
            self.guard.observe(seconds)
        if self._store.routed:
            for layer, ids in enumerate(row.ids):
                self._store.routed(layer, ids[None], torch.empty(0))

    def _steps(self, rows: list[Row]) -> Steps:
        def column(name: str) -> NDArray[np.int64]:
            return np.array([getattr(row, name) for row in rows[1:]], np.int64)

        return Steps(
            seconds=np.diff([row.stamp for row in rows]) * 1e-9,
            tokens=column("token"),
            routed=self.step.routed,
            uploads=column("uploaded_bytes") // max(1, self._store.record_bytes[0]),
            **{name: column(name) for name in ("hits", "covered", "late", "misses", "wasted")},
        )
