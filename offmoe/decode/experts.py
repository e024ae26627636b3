"""The experts of a decode step: norm, router, top-k and residency → gate and up, in which some programs bring what is
missing and multiply it as it comes → down, summed into x.

Shared experts are two nodes more; a layer without experts has norm and these. Beside the main lane candidates to leave
are listed, a later layer is predicted and fetched, and a policy foretells.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.decode.buffers import StepBuffers
from offmoe.decode.variant import Variant
from offmoe.experts.vram_store import VramStore
from offmoe.kernels.gpu import sandwich
from offmoe.kernels.gpu.experts import expert_down, expert_gate_up, movers_scratch
from offmoe.kernels.gpu.foretell import Past, foretell
from offmoe.kernels.gpu.norm_rope import rms_norm
from offmoe.kernels.gpu.page_in import Copies, page_in, scratch_for
from offmoe.kernels.gpu.request import request
from offmoe.kernels.gpu.resolve import candidates
from offmoe.kernels.gpu.route import predict, route
from offmoe.kernels.gpu.table import Table
from offmoe.machine.streams import Event, Stream
from offmoe.plan import Plan
from offmoe.prefetch import Gate
from offmoe.trunk.device_trunk import DeviceTrunk
from offmoe.trunk.device_weights import DeviceLayer


class ExpertsStep:
    """Launches of one token over static buffers."""

    def __init__(
        self,
        plan: Plan,
        trunk: DeviceTrunk,
        store: VramStore,
        buffers: StepBuffers,
        table: Table,
        gate: Gate,
        pdl: bool,
    ) -> None:
        self.config, self.plan, self.trunk, self.store = trunk.config, plan, trunk, store
        self.buffers, self.table, self.gate, self.pdl = buffers, table, gate, pdl
        device, c = plan.device, self.config
        self._device = device
        self._forced: Tensor | None = None
        self._predicted: Tensor | None = None
        self._scratch, self._ahead_scratch = movers_scratch(store.layouts, device), scratch_for(device)
        self._units = [nbytes // 16 for nbytes in store.record_bytes]
        self._side_stream, self._ahead, self._fetching = (Stream(device) for _ in range(3))
        self._forked, self._listed, self._routed = (Event(device) for _ in range(3))
        self._predicted_event, self._foretold = Event(device), Event(device)
        self._fetched = [Event(device) for _ in range(c.moe_layers)]
        self._rows = torch.full((store.table.layers * c.experts,), -1, dtype=torch.int32, device=device)
        self._rows_version = -1
        self._request_seq = torch.zeros(1, dtype=torch.int32, device=device)

    def begin(self) -> None:
        """What is done beside a token's first layer."""
        if not self.plan.all_in_slots:
            self._forked.set()
            self._list_candidates(self._forked)

    def launch(self, layer: int, variant: Variant) -> None:
        """The feed-forward part of a layer."""
        moe_layer = self.config.moe_layer_of(layer)
        if moe_layer is None:
            self._dense(layer)
        else:
            self._route(moe_layer, variant)
            self._experts(moe_layer, variant)

    def force(self, ids: NDArray[np.int16] | None) -> bool:
        """Routing to replay; True where a graph that was captured before points to other memory."""
        self._forced, moved = into(self._forced, ids, self._device)
        return moved

    def emulate(self, predicted: NDArray[np.int16] | None) -> bool:
        """Predictions to replay, likewise."""
        self._predicted, moved = into(self._predicted, predicted, self._device)
        return moved

    def know_rows(self) -> None:
        """Tell the device which rows of RAM have been filled since it was told last."""
        ram = self.store.ram
        if ram.version != self._rows_version:
            self._rows_version = ram.version
            self._rows.copy_(torch.from_numpy(ram.known_rows()))

    def _dense(self, layer: int) -> None:
        """The feed-forward part of a layer without experts."""
        b, w = self.buffers, self.trunk.layers[layer]
        rms_norm(b.x, w.ffn_norm_striped, self.config.stream_eps, b.normed, w.ffn_norm_bias_striped)
        self._resident_ffn(w, b.one, b.normed, b.dense_inner, b.x)

    def _resident_ffn(self, w: DeviceLayer, weight: Tensor, given: Tensor, inner: Tensor, out: Tensor) -> None:
        """out += weight [1] · what every token passes makes of `given`."""
        b = self.buffers
        assert w.resident_ffn is not None
        records, layout = w.resident_ffn.records, w.resident_ffn.layout
        expert_gate_up(records, layout, b.only, weight, given, inner, glu=self.config.moe.glu, pdl=self.pdl)
        expert_down(records, layout, b.only, inner, out, pdl=self.pdl)

    def _layer(self, moe_layer: int) -> DeviceLayer:
        """Of a layer with experts; from here on layers are counted among these."""
        return self.trunk.layers[self.config.routed[moe_layer]]

    def _route(self, layer: int, variant: Variant) -> None:
        """Whoever lists candidates or predicts beside the main lane is waited for first: a whole edge."""
        b, c, w = self.buffers, self.config, self._layer(layer)
        assert w.router is not None
        joins = False
        if not self.plan.all_in_slots and (layer == 0 or self.store.table.scope == "global"):
            self._listed.wait()
            joins = True
        if variant.prefetch and 0 < layer <= c.moe_layers - self.gate.ahead:
            self._predicted_event.wait()
            joins = True
        route(
            b.x[0], w.ffn_norm_striped, c.stream_eps, w.router, self.table, layer, layers=c.moe_layers,
            rule=c.moe.rule, bias=w.router_bias, offset=w.router_offset, shift=w.ffn_norm_bias_striped,
            factors=w.router_factors, apart=c.norm.sandwich, logits=b.router_logits, normed=b.normed[0],
            ticket=b.route_ticket, ids=b.ids, weights=b.weights, slots=b.slots, hit=b.hit, miss_count=b.miss_count,
            miss_records=b.miss_records, miss_slots=b.miss_slots, status=b.status, counters=b.counters, log=b.log,
            step=b.steps, units=self._units[layer], forced=self._forced if variant.forced else None,
            fetched=(b.fetch_count[layer], b.fetch_slots[layer]) if variant.prefetch else None,
            raw=b.raw if variant.prefetch else None,  # expert_down changes x while the prediction reads it
            pdl=self.pdl and not joins,
        )  # fmt: skip
        self._routed.set()
        predicts = variant.prefetch and layer + self.gate.ahead < c.moe_layers
        if predicts:
            self._prefetch(layer + self.gate.ahead, variant)
        if not self.plan.all_in_slots and self.store.table.scope == "global" and layer + 1 < c.moe_layers:
            self._list_candidates(self._predicted_event if predicts else self._routed)
        if past := self._listener(layer):
            with self._side_stream():
                self._routed.wait()
                foretell(past, b.log, b.status, k=c.top_k, experts=c.experts)
                self._foretold.set()

    def _listener(self, layer: int) -> Past | None:
        """What foretells beside the last layer's experts, if the policy does; done before `choose` ends the answer."""
        return None if self.plan.all_in_slots or layer < self.config.moe_layers - 1 else self.table.past

    def _list_candidates(self, behind: Event) -> None:
        """Beside the main lane: behind all that changed the table, before the next event."""
        t = self.table
        with self._side_stream():
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
                b.raw, w.ffn_norm_striped, c.stream_eps, w.router, self.table, layer, layers=c.moe_layers,
                rule=c.moe.rule, bias=w.router_bias, offset=w.router_offset, shift=w.ffn_norm_bias_striped,
                apart=c.norm.sandwich, least=self.gate.least,
                most=self.gate.most,
                logits=b.predict_logits, ticket=b.predict_ticket, held=b.slots, fetch_count=b.fetch_count[layer],
                fetch_records=b.fetch_records[layer], fetch_slots=b.fetch_slots[layer], status=b.status,
                counters=b.counters, step=b.steps, units=self._units[layer], emulated=self._predicted if
                variant.emulated else None,
            )  # fmt: skip
            self._predicted_event.set()
        with self._fetching():  # a lane of its own: the next prediction does not wait for copies
            self._predicted_event.wait()
            copies = Copies(
                b.fetch_count[layer], b.fetch_slots[layer], self._ahead_scratch, None, b.fetch_records[layer],
                self.store.ram.base, self.plan.stride,
            )  # fmt: skip
            page_in(
                copies, self.store.slot_memory, self.store.layouts[layer], landed=self.table.landed,
                progress=self.table.progress,
            )  # fmt: skip
            self._fetched[layer].set()

    def _experts(self, layer: int, variant: Variant) -> None:
        """Multiply what is there while what is missing comes; behind a join, a whole edge, there is no early start."""
        b, c, store, w = self.buffers, self.config, self.store, self._layer(layer)
        records, layout = store.slot_memory, store.layouts[layer]
        gate_up_bias, down_bias = store.biases[layer] if store.biases else (None, None)
        if w.resident_ffn:
            given, out = (b.shared_expert_in, b.shared_expert) if w.sandwich else (b.normed, b.x)
            self._resident_ffn(w, b.weights[c.top_k :] if c.moe.shared_gated else b.one, given, b.shared_inner, out)
        copies = None if self.plan.all_in_slots else self._copies(variant)
        joins = self._join(layer, variant)
        expert_gate_up(
            records, layout, b.slots, b.weights, b.normed, b.inner, copies=copies, glu=c.moe.glu, ids=b.ids,
            bias=gate_up_bias, before=c.moe.weighted_input, pdl=self.pdl and not joins,
        )  # fmt: skip
        expert_down(
            records, layout, b.slots, b.inner, b.added if w.sandwich else b.x, ids=b.ids, weights=b.weights,
            bias=down_bias, count=copies.count if copies else None, pdl=self.pdl,
        )  # fmt: skip
        if w.sandwich_striped:
            sandwich.fed(b.x, b.shared_expert, b.added, w.sandwich_striped, c.stream_eps, self.pdl)

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


def into(held: Tensor | None, ids: NDArray[np.int16] | None, device: torch.device) -> tuple[Tensor | None, bool]:
    """`ids` on the device, in the memory of `held` where they fit it."""
    if ids is None:
        return held, False
    fresh = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int16))
    if held is not None and held.shape == fresh.shape:
        return held.copy_(fresh), False
    return fresh.to(device), True
