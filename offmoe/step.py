"""One decoded token as a sequence of launches: what the graph captures, and what tests run through the interpreter.

A layer is six nodes: norm and qkv → attention, or what a layer without keys mixes by → output → norm, router, top-k and
residency → gate and up, in which some programs bring what is missing and multiply it as it comes → down, summed into x.
Latent attention is three nodes, or four. Shared experts are two nodes more; a layer without experts has norm and these.
Norms around the parts are two more.
Nothing here allocates, waits or reads a tensor on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.device_table import device_table, lose, pull, push, reach
from offmoe.gate import Gate
from offmoe.kernels.gpu import mla, sandwich
from offmoe.kernels.gpu.advance import advance
from offmoe.kernels.gpu.attention import decode_attention, pick_splits
from offmoe.kernels.gpu.embed import embed
from offmoe.kernels.gpu.experts import expert_down, expert_gate_up, movers_scratch
from offmoe.kernels.gpu.foretell import Past, foretell
from offmoe.kernels.gpu.gemv import dense
from offmoe.kernels.gpu.keyless import mix_step
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.gpu.norm_rope import rms_norm
from offmoe.kernels.gpu.page_in import Copies, page_in, scratch_for
from offmoe.kernels.gpu.request import request
from offmoe.kernels.gpu.resolve import candidates
from offmoe.kernels.gpu.route import predict, route
from offmoe.kernels.gpu.sample import FULL, Scratch, sample_step
from offmoe.kernels.mla import LATENT_EPS
from offmoe.kernels.ring import ABORTED, DONE, Ring, row_words
from offmoe.kvcache import KVCache
from offmoe.memory import host_memory, register, unregister
from offmoe.models.device_trunk import DeviceTrunk, normed_dense
from offmoe.models.device_weights import DeviceLatent, DeviceLayer
from offmoe.plan import Plan
from offmoe.states import NOWHERE
from offmoe.step_buffers import StepBuffers
from offmoe.streams import Lane, Mark
from offmoe.vram import VramStore

RING_ROWS = 64  # many more than are ever under way


@dataclass(frozen=True)
class Variant:
    """What a captured graph is for; another is captured where one of these changes. The context's length is not one:
    attention divides it on the device."""

    sampler: str = "greedy"  # or topk, full
    served: bool = False  # missing records may have to be asked of the host
    forced: bool = False  # routing out of a table, for benchmarks and the floor
    prefetch: bool = False
    emulated: bool = False  # the predictor out of a table


class DecodeStep:
    """Launches of one token over static buffers. On the CPU (tests) the same launches are interpreted."""

    def __init__(self, plan: Plan, trunk: DeviceTrunk, store: VramStore, kv: KVCache) -> None:
        self.config, self.plan, self.trunk, self.store, self.kv = trunk.config, plan, trunk, store, kv
        c, device = self.config, plan.device
        self.device = device
        self.pdl = pdl_supported(device)
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        self.splits = {
            h: mla.pick_splits(plan.ctx, h.heads, sms) if c.latent else pick_splits(plan.ctx, h.kv_heads, sms)
            for h in c.kinds_of_heads
        }
        self.buffers = StepBuffers(c, {h: splits for h, (splits, _) in self.splits.items()}, device)
        self.gate = Gate.of(plan.prefetch).within(store.table, c.top_k)
        self.table = device_table(store.table, reach(store.table, c.top_k, self.gate.most), device)
        self.routed = c.places * c.top_k  # records a step, at most
        self.sampler = Scratch.of(c.vocab, device)
        words = row_words(self.routed)
        memory = host_memory(RING_ROWS * words * 4).view(torch.int32).view(RING_ROWS, words)
        self._pinned = [memory] if device.type == "cuda" else []
        for tensor in self._pinned:
            register(tensor)
        self.ring = Ring(memory, c.places, c.top_k)
        self._forced: Tensor | None = None
        self._predicted: Tensor | None = None
        self._scratch, self._ahead_scratch = movers_scratch(store.layouts, device), scratch_for(device)
        self._units = [nbytes // 16 for nbytes in store.record_bytes]
        self._beside, self._ahead, self._fetching = (Lane(device) for _ in range(3))
        self._forked, self._listed, self._routed = (Mark(device) for _ in range(3))
        self._predicted_mark, self._foretold = Mark(device), Mark(device)
        self._fetched = [Mark(device) for _ in range(c.places)]
        self._rows = torch.full((store.table.layers * c.experts,), -1, dtype=torch.int32, device=device)
        self._rows_version = -1
        self._request_seq = torch.zeros(1, dtype=torch.int32, device=device)

    def launch(self, variant: Variant) -> None:
        """Run the token in `buffers.token` at `buffers.position`, and choose the next one."""
        b, c = self.buffers, self.config
        embed(b.token, self.trunk.embedding, b.x, striped=True, scale=c.stream_scale)
        if not self.plan.all_in_slots:
            self._forked.set()
            self._list_candidates(self._forked)
        for layer in range(c.layers):
            self._attend(layer)
            place = c.place_of(layer)
            if place is None:
                self._dense(layer)
            else:
                self._route(place, variant)
                self._experts(place, variant)
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

    def _attend(self, layer: int) -> None:
        b, c, w = self.buffers, self.config, self.trunk.layers[layer]
        qkv, mixed = self._mixed(w)
        normed_dense(b.x, w.attn_norm_striped, w.attn_norm_bias_striped, c.stream_eps, b.normed, w.qkv, qkv,
                     w.qkv_bias, self.pdl and layer > 0)  # fmt: skip
        if w.mixer:
            states, index = self.kv.state_of(layer)
            mix_step(qkv[0], w.mixer, states.memory[index], states.recent[index], b.position, b.status, mixed[0],
                     ctx=self.plan.ctx, pdl=self.pdl)  # fmt: skip
        elif w.latent:
            self._attend_latents(layer, w.latent)
        else:
            self._attend_heads(layer)
        dense(mixed, w.o, b.given if w.sandwich else b.x, bias=w.o_bias, residual=True, pdl=self.pdl)
        if w.sandwich_striped:
            sandwich.attended(b.x, b.given, w.sandwich_striped, c.stream_eps, b.beside_in, b.beside, b.added, self.pdl)

    def _mixed(self, w: DeviceLayer) -> tuple[Tensor, Tensor]:
        """As much of the buffers as the layer's two products have rows and columns."""
        rows, cols = sum(form.rows for _, form in w.qkv), w.o[0][1].cols
        return self.buffers.qkv[:, :rows], self.buffers.mixed[:, :cols]

    def _attend_heads(self, layer: int) -> None:
        b, c, w, h = self.buffers, self.config, self.trunk.layers[layer], self.config.heads_of(layer)
        qkv, mixed = self._mixed(w)
        (keys, values), (table, temper) = self.kv.layer(layer), self.trunk.rope_of(layer)
        splits, split_size = self.splits[h]
        decode_attention(
            qkv[0, c.gate_rows :], keys, values, b.position, table, mixed[0], b.partial, b.attention_tickets,
            heads=h.heads, kv_heads=h.kv_heads, head_dim=h.head_dim, q_norm=w.q_norm, k_norm=w.k_norm,
            norm_full=c.qk_norm == "full", norm_after=c.norm_after, clip=c.clip_qkv, eps=c.norm_eps,
            splits=splits, split_size=split_size, scales=self.kv.scales(layer), scale=c.score_scale,
            window=c.window(layer), chunked=c.chunked, sinks=w.sinks, temper=temper, value_norm=c.value_norm,
            gate=qkv[0, : c.gate_rows] if c.output_gated else None, pdl=self.pdl,
        )  # fmt: skip

    def _attend_latents(self, layer: int, w: DeviceLatent) -> None:
        """Three launches, four where queries have a latent of their own."""
        b, c, z, h = self.buffers, self.config, self.config.latent, self.config.heads_of(layer)
        assert z is not None, "its weights are there"
        splits, split_size = self.splits[h]
        query = b.qkv
        if w.q_b:
            dense(b.qkv[:, : z.q_rank], w.q_b, b.query, norm=w.q_a_norm, eps=LATENT_EPS, pdl=self.pdl)
            query = b.query
        mla.decode_latents(
            query[0, : c.heads * z.key], b.qkv[0, -z.width :], self.kv.latents(layer), b.position, self.trunk.ropes[h],
            w.kv_a_norm, w.k_b[0], w.v_b[0], b.mixed[0], b.absorbed, b.partial, heads=c.heads, latent=z,
            scale=c.score_scale, splits=splits, split_size=split_size, pdl=self.pdl,
        )  # fmt: skip

    def _dense(self, layer: int) -> None:
        """The feed-forward part of a layer without experts."""
        b, w = self.buffers, self.trunk.layers[layer]
        rms_norm(b.x, w.ffn_norm_striped, self.config.stream_eps, b.normed, w.ffn_norm_bias_striped)
        self._beside_experts(w, b.one, b.normed, b.dense_inner, b.x)

    def _beside_experts(self, w: DeviceLayer, weight: Tensor, given: Tensor, inner: Tensor, out: Tensor) -> None:
        """out += weight [1] · what every token passes makes of `given`."""
        b = self.buffers
        assert w.beside is not None
        records, layout = w.beside.records, w.beside.layout
        expert_gate_up(records, layout, b.only, weight, given, inner, glu=self.config.glu, pdl=self.pdl)
        expert_down(records, layout, b.only, inner, out, pdl=self.pdl)

    def _layer(self, place: int) -> DeviceLayer:
        """Of a layer with experts; from here on layers are counted among these."""
        return self.trunk.layers[self.config.routed[place]]

    def _route(self, layer: int, variant: Variant) -> None:
        """Whoever lists candidates or predicts beside the main lane is waited for first: a whole edge."""
        b, c, w = self.buffers, self.config, self._layer(layer)
        assert w.router is not None
        joins = False
        if not self.plan.all_in_slots and (layer == 0 or self.store.table.scope == "global"):
            self._listed.wait()
            joins = True
        if variant.prefetch and 0 < layer <= c.places - self.gate.ahead:
            self._predicted_mark.wait()
            joins = True
        route(
            b.x[0], w.ffn_norm_striped, c.stream_eps, w.router, self.table, layer, layers=c.places,
            rule=c.rule, bias=w.router_bias, offset=w.router_offset, shift=w.ffn_norm_bias_striped,
            factors=w.router_factors, apart=c.sandwich, logits=b.router_logits, normed=b.normed[0],
            ticket=b.route_ticket, ids=b.ids, weights=b.weights, slots=b.slots, hit=b.hit, miss_count=b.miss_count,
            miss_records=b.miss_records, miss_slots=b.miss_slots, status=b.status, counters=b.counters, log=b.log,
            step=b.steps, units=self._units[layer], forced=self._forced if variant.forced else None,
            fetched=(b.fetch_count[layer], b.fetch_slots[layer]) if variant.prefetch else None,
            raw=b.raw if variant.prefetch else None,  # expert_down changes x while the prediction reads it
            pdl=self.pdl and not joins,
        )  # fmt: skip
        self._routed.set()
        predicts = variant.prefetch and layer + self.gate.ahead < c.places
        if predicts:
            self._prefetch(layer + self.gate.ahead, variant)
        if not self.plan.all_in_slots and self.store.table.scope == "global" and layer + 1 < c.places:
            self._list_candidates(self._predicted_mark if predicts else self._routed)
        if past := self._listener(layer):
            with self._beside():
                self._routed.wait()
                foretell(past, b.log, b.status, k=c.top_k, experts=c.experts)
                self._foretold.set()

    def _listener(self, layer: int) -> Past | None:
        """What foretells beside the last layer's experts, if the policy does; done before `choose` ends the answer."""
        return None if self.plan.all_in_slots or layer < self.config.places - 1 else self.table.past

    def _list_candidates(self, behind: Mark) -> None:
        """Beside the main lane: behind all that changed the table, before the next event."""
        t = self.table
        with self._beside():
            behind.wait()
            candidates(
                t.owner, t.arriving, t.a, t.b, t.decay, t.clock, t.candidates, kind=t.kind, scratch=t.scratch,
                foretold=t.foretold, worth=t.worth,
            )  # fmt: skip
            self._listed.set()

    def _prefetch(self, layer: int, variant: Variant) -> None:
        """Predict `layer` from the stream as it is now, and fetch; all beside the main lane."""
        b, c, w = self.buffers, self.config, self._layer(layer)
        assert w.router is not None
        with self._ahead():
            self._routed.wait()
            predict(
                b.raw, w.ffn_norm_striped, c.stream_eps, w.router, self.table, layer, layers=c.places, rule=c.rule,
                bias=w.router_bias, offset=w.router_offset, shift=w.ffn_norm_bias_striped,
                apart=c.sandwich, least=self.gate.least,
                most=self.gate.most,
                logits=b.predict_logits, ticket=b.predict_ticket, held=b.slots, fetch_count=b.fetch_count[layer],
                fetch_records=b.fetch_records[layer], fetch_slots=b.fetch_slots[layer], status=b.status,
                counters=b.counters, step=b.steps, units=self._units[layer], emulated=self._predicted if
                variant.emulated else None,
            )  # fmt: skip
            self._predicted_mark.set()
        with self._fetching():  # a lane of its own: the next prediction does not wait for copies
            self._predicted_mark.wait()
            copies = Copies(
                b.fetch_count[layer], b.fetch_slots[layer], self._ahead_scratch, None, b.fetch_records[layer],
                self.store.ram.base, self.plan.stride,
            )  # fmt: skip
            page_in(
                copies, self.store.records, self.store.layouts[layer], landed=self.table.landed,
                progress=self.table.progress,
            )  # fmt: skip
            self._fetched[layer].set()

    def _experts(self, layer: int, variant: Variant) -> None:
        """Multiply what is there while what is missing comes; behind a join, a whole edge, there is no early start."""
        b, c, store, w = self.buffers, self.config, self.store, self._layer(layer)
        records, layout = store.records, store.layouts[layer]
        gate_up_bias, down_bias = store.biases[layer] if store.biases else (None, None)
        if w.beside:
            given, out = (b.beside_in, b.beside) if w.sandwich else (b.normed, b.x)
            self._beside_experts(w, b.weights[c.top_k :] if c.shared_gated else b.one, given, b.shared_inner, out)
        copies = None if self.plan.all_in_slots else self._copies(variant)
        joins = self._join(layer, variant)
        expert_gate_up(
            records, layout, b.slots, b.weights, b.normed, b.inner, copies=copies, glu=c.glu, ids=b.ids,
            bias=gate_up_bias, before=c.weighted_input, pdl=self.pdl and not joins,
        )  # fmt: skip
        expert_down(
            records, layout, b.slots, b.inner, b.added if w.sandwich else b.x, ids=b.ids, weights=b.weights,
            bias=down_bias, count=copies.count if copies else None, pdl=self.pdl,
        )  # fmt: skip
        if w.sandwich_striped:
            sandwich.fed(b.x, b.beside, b.added, w.sandwich_striped, c.stream_eps, self.pdl)

    def _join(self, layer: int, variant: Variant) -> bool:
        """Wait for lanes whose work this layer, or the token's end, needs; True if there was one."""
        late = variant.prefetch and layer >= self.gate.ahead
        if late:
            self._fetched[layer].wait()
        foretold = self._listener(layer) is not None
        if foretold:
            self._foretold.wait()
        return late or foretold

    def _copies(self, variant: Variant) -> Copies:
        """Of this layer's misses; the host is asked first where one of them may lie in no known row."""
        b, ram = self.buffers, self.store.ram
        if not variant.served:
            return Copies(b.miss_count, b.miss_slots, self._scratch, None, b.miss_records, ram.base, self.plan.stride)
        request(
            ram.mailbox, b.miss_count, b.miss_records, b.sources, self._rows, ram.base, self.plan.stride, b.status,
            self._request_seq,
        )  # fmt: skip
        return Copies(b.miss_count, b.miss_slots, self._scratch, b.sources)

    def push(self, clock: int, position: int) -> None:
        """Residency to the device; `position`: where the next token will stand. Steps count from 0 again.

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
        """Residency back to the host, once nothing runs any more; returns the number of the last token."""
        token = pull(self.store.table, self.table) - 1
        position, aborted = int(self.buffers.position), int(self.buffers.status) == ABORTED
        self.kv.wrote(position)
        self.kv.stepped(NOWHERE if aborted else position)
        if aborted:
            lose(self.store.table, self.buffers.miss_records, self.buffers.miss_slots)
        return token

    def know_rows(self) -> None:
        """Tell the device which rows of RAM have been filled since it was told last."""
        ram = self.store.ram
        if ram.version != self._rows_version:
            self._rows_version = ram.version
            self._rows.copy_(torch.from_numpy(ram.known_rows()))

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Launches inside change nothing, as if the answer were over and the context full: no key is written, no
        state goes on."""
        b = self.buffers
        status, position = b.status.clone(), b.position.clone()
        b.status.fill_(DONE)
        b.position.fill_(self.plan.ctx)
        yield
        b.status.copy_(status)
        b.position.copy_(position)

    def force(self, ids: NDArray[np.int16] | None) -> bool:
        """Routing to replay; True where a graph that was captured before points to other memory."""
        self._forced, moved = into(self._forced, ids, self.device)
        return moved

    def emulate(self, predicted: NDArray[np.int16] | None) -> bool:
        """Predictions to replay, likewise."""
        self._predicted, moved = into(self._predicted, predicted, self.device)
        return moved

    def close(self) -> None:
        for tensor in self._pinned:
            unregister(tensor)
        self._pinned.clear()


def into(held: Tensor | None, ids: NDArray[np.int16] | None, device: torch.device) -> tuple[Tensor | None, bool]:
    """`ids` on the device, in the memory of `held` where they fit it."""
    if ids is None:
        return held, False
    fresh = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int16))
    if held is not None and held.shape == fresh.shape:
        return held.copy_(fresh), False
    return fresh.to(device), True
