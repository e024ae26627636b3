"""Feed-forward part of a decode step: RMS norm, router, top-k and residency; gate and up; down, added to x.

A dense layer has only the norm, gate and up, and down; a shared expert adds two launches. Missing experts are copied by
some programs of the gate-and-up kernel, which multiply each piece as it arrives.

Streams and events of MoE layer m, when layer m + d is predicted at layer m (d = gate.ahead). `set:e` records event e on
its stream, `wait:e` makes the stream wait for it; time runs to the right:

  main      begin set:forked | wait:listed wait:predicted route(m) set:routed | wait:fetched[m] wait:foretold
                                           gate_up(m) down(m) | attention of the next layer | route(m + 1) …
  predict   wait:routed  predict(m + d)  set:predicted
  fetch     wait:predicted  page_in(m + d)  set:fetched[m + d]
  side      wait:forked (token begins) or wait:routed or wait:predicted  candidates  set:listed
            wait:routed (last layer)  foretell (policy echo)  set:foretold

`listed` is waited for before the first route of a token and, with scope "global", before every route; `predicted`
before a route that follows a prediction, since both write the table; `fetched[m]` where layer m was predicted;
`foretold` in the last layer. On a CPU, streams and events do nothing and launches run in program order.
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
    """Launches of the feed-forward part of one token, over static buffers."""

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
        self._scratch, self._fetch_scratch = movers_scratch(store.layouts, device), scratch_for(device)
        self._units = [nbytes // 16 for nbytes in store.record_bytes]
        self._side_stream, self._predict_stream, self._fetch_stream = (Stream(device) for _ in range(3))
        self._forked, self._listed, self._routed = (Event(device) for _ in range(3))
        self._predicted_event, self._foretold = Event(device), Event(device)
        self._fetched = [Event(device) for _ in range(c.moe_layers)]
        self._rows = torch.full((store.table.layers * c.experts,), -1, dtype=torch.int32, device=device)
        self._rows_version = -1
        self._request_seq = torch.zeros(1, dtype=torch.int32, device=device)

    def begin(self) -> None:
        """Start listing the eviction candidates for the first MoE layer on the side stream."""
        if not self.plan.all_in_slots:
            self._forked.set()
            self._list_candidates(self._forked)

    def launch(self, layer: int, variant: Variant) -> None:
        """Launch the feed-forward part of the model's `layer`."""
        moe_layer = self.config.moe_layer_of(layer)
        if moe_layer is None:
            self._dense(layer)
        else:
            self._route(moe_layer, variant)
            self._experts(moe_layer, variant)

    def force(self, ids: NDArray[np.int16] | None) -> bool:
        """Set the routing to replay; return True if captured graphs must be captured again.

        They must if the ids moved to other memory.
        """
        self._forced, moved = into(self._forced, ids, self._device)
        return moved

    def emulate(self, predicted: NDArray[np.int16] | None) -> bool:
        """Set the predictions to replay; return True if captured graphs must be captured again."""
        self._predicted, moved = into(self._predicted, predicted, self._device)
        return moved

    def know_rows(self) -> None:
        """Copy the table of filled RAM rows to the device if it has changed since the last copy."""
        ram = self.store.ram
        if ram.version != self._rows_version:
            self._rows_version = ram.version
            self._rows.copy_(torch.from_numpy(ram.known_rows()))

    def _dense(self, layer: int) -> None:
        """Launch the feed-forward part of a layer without experts."""
        b, w = self.buffers, self.trunk.layers[layer]
        rms_norm(b.x, w.ffn_norm_striped, self.config.stream_eps, b.normed, w.ffn_norm_bias_striped)
        self._resident_ffn(w, b.one, b.normed, b.dense_inner, b.x)

    def _resident_ffn(self, w: DeviceLayer, weight: Tensor, given: Tensor, inner: Tensor, out: Tensor) -> None:
        """Add weight [1] · FFN(given) to `out`, with the weights of the dense FFN or the shared expert."""
        b = self.buffers
        assert w.resident_ffn is not None
        records, layout = w.resident_ffn.records, w.resident_ffn.layout
        expert_gate_up(records, layout, b.only, weight, given, inner, glu=self.config.moe.glu, pdl=self.pdl)
        expert_down(records, layout, b.only, inner, out, pdl=self.pdl)

    def _layer(self, moe_layer: int) -> DeviceLayer:
        """Return the weights of the `moe_layer`-th MoE layer."""
        return self.trunk.layers[self.config.routed[moe_layer]]

    def _route(self, moe_layer: int, variant: Variant) -> None:
        """Launch the router; then, on other streams, prediction, candidates and foretelling.

        Where it first waits for another stream, programmatic dependent launch is off: the wait is a full dependency.
        """
        b, c, w = self.buffers, self.config, self._layer(moe_layer)
        assert w.router is not None
        waits = False
        if not self.plan.all_in_slots and (moe_layer == 0 or self.store.table.scope == "global"):
            self._listed.wait()
            waits = True
        if variant.prefetch and 0 < moe_layer <= c.moe_layers - self.gate.ahead:
            self._predicted_event.wait()
            waits = True
        route(
            b.x[0],
            w.ffn_norm_striped,
            c.stream_eps,
            w.router,
            self.table,
            moe_layer,
            layers=c.moe_layers,
            rule=c.moe.rule,
            bias=w.router_bias,
            offset=w.router_offset,
            shift=w.ffn_norm_bias_striped,
            factors=w.router_factors,
            apart=c.norm.sandwich,
            logits=b.router_logits,
            normed=b.normed[0],
            ticket=b.route_ticket,
            ids=b.ids,
            weights=b.weights,
            slots=b.slots,
            hit=b.hit,
            miss_count=b.miss_count,
            miss_records=b.miss_records,
            miss_slots=b.miss_slots,
            status=b.status,
            counters=b.counters,
            log=b.log,
            step=b.steps,
            units=self._units[moe_layer],
            forced=self._forced if variant.forced else None,
            fetched=(b.fetch_count[moe_layer], b.fetch_slots[moe_layer]) if variant.prefetch else None,
            raw=b.raw if variant.prefetch else None,  # expert_down changes x while the prediction reads it
            pdl=self.pdl and not waits,
        )
        self._routed.set()
        predicts = variant.prefetch and moe_layer + self.gate.ahead < c.moe_layers
        if predicts:
            self._prefetch(moe_layer + self.gate.ahead, variant)
        if not self.plan.all_in_slots and self.store.table.scope == "global" and moe_layer + 1 < c.moe_layers:
            self._list_candidates(self._predicted_event if predicts else self._routed)
        if past := self._past_at(moe_layer):
            with self._side_stream():
                self._routed.wait()
                foretell(past, b.log, b.status, k=c.top_k, experts=c.experts)
                self._foretold.set()

    def _past_at(self, moe_layer: int) -> Past | None:
        """Return the arrays of policy echo in the last MoE layer, else None: it foretells once per token."""
        return None if self.plan.all_in_slots or moe_layer < self.config.moe_layers - 1 else self.table.past

    def _list_candidates(self, changed: Event) -> None:
        """List eviction candidates on the side stream once `changed`, the last change of the table, has happened."""
        t = self.table
        with self._side_stream():
            changed.wait()
            candidates(
                t.owner,
                t.arriving,
                t.a,
                t.b,
                t.decay,
                t.clock,
                t.candidates,
                kind=t.kind,
                scratch=t.scratch,
                foretold=t.foretold,
                worth=t.worth,
            )
            self._listed.set()

    def _prefetch(self, moe_layer: int, variant: Variant) -> None:
        """Predict the experts of `moe_layer` from the current residual stream, and fetch those that are absent."""
        b, c, w = self.buffers, self.config, self._layer(moe_layer)
        assert w.router is not None
        with self._predict_stream():
            self._routed.wait()
            predict(
                b.raw,
                w.ffn_norm_striped,
                c.stream_eps,
                w.router,
                self.table,
                moe_layer,
                layers=c.moe_layers,
                rule=c.moe.rule,
                bias=w.router_bias,
                offset=w.router_offset,
                shift=w.ffn_norm_bias_striped,
                apart=c.norm.sandwich,
                least=self.gate.least,
                most=self.gate.most,
                logits=b.predict_logits,
                ticket=b.predict_ticket,
                held=b.slots,
                fetch_count=b.fetch_count[moe_layer],
                fetch_records=b.fetch_records[moe_layer],
                fetch_slots=b.fetch_slots[moe_layer],
                status=b.status,
                counters=b.counters,
                step=b.steps,
                units=self._units[moe_layer],
                emulated=self._predicted if variant.emulated else None,
            )
            self._predicted_event.set()
        with self._fetch_stream():  # not the predict stream: the next prediction must not wait for these copies
            self._predicted_event.wait()
            copies = Copies(
                b.fetch_count[moe_layer],
                b.fetch_slots[moe_layer],
                self._fetch_scratch,
                None,
                b.fetch_records[moe_layer],
                self.store.ram.base,
                self.plan.stride,
            )
            page_in(
                copies,
                self.store.slot_memory,
                self.store.layouts[moe_layer],
                landed=self.table.landed,
                progress=self.table.progress,
            )
            self._fetched[moe_layer].set()

    def _experts(self, moe_layer: int, variant: Variant) -> None:
        """Launch the shared expert, then gate and up and down of the routed experts.

        After a wait for another stream, programmatic dependent launch is off.
        """
        b, c, store, w = self.buffers, self.config, self.store, self._layer(moe_layer)
        records, layout = store.slot_memory, store.layouts[moe_layer]
        gate_up_bias, down_bias = store.biases[moe_layer] if store.biases else (None, None)
        if w.resident_ffn:
            given, out = (b.shared_expert_in, b.shared_expert) if w.sandwich else (b.normed, b.x)
            self._resident_ffn(w, b.weights[c.top_k :] if c.moe.shared_gated else b.one, given, b.shared_inner, out)
        copies = None if self.plan.all_in_slots else self._copies(variant)
        waits = self._wait_for_streams(moe_layer, variant)
        expert_gate_up(
            records,
            layout,
            b.slots,
            b.weights,
            b.normed,
            b.inner,
            copies=copies,
            glu=c.moe.glu,
            ids=b.ids,
            bias=gate_up_bias,
            before=c.moe.weighted_input,
            pdl=self.pdl and not waits,
        )
        expert_down(
            records,
            layout,
            b.slots,
            b.inner,
            b.added if w.sandwich else b.x,
            ids=b.ids,
            weights=b.weights,
            bias=down_bias,
            count=copies.count if copies else None,
            pdl=self.pdl,
        )
        if w.sandwich_striped:
            sandwich.fed(b.x, b.shared_expert, b.added, w.sandwich_striped, c.stream_eps, self.pdl)

    def _wait_for_streams(self, moe_layer: int, variant: Variant) -> bool:
        """Wait for the prefetch of this layer and for foretelling; return True if the stream waited for either."""
        late = variant.prefetch and moe_layer >= self.gate.ahead
        if late:
            self._fetched[moe_layer].wait()
        foretold = self._past_at(moe_layer) is not None
        if foretold:
            self._foretold.wait()
        return late or foretold

    def _copies(self, variant: Variant) -> Copies:
        """Return the copies of a layer's misses; a served variant first asks the host for their addresses."""
        b, ram = self.buffers, self.store.ram
        if not variant.served:
            return Copies(b.miss_count, b.miss_slots, self._scratch, None, b.miss_records, ram.base, self.plan.stride)
        request(
            ram.mailbox,
            b.miss_count,
            b.miss_records,
            b.sources,
            self._rows,
            ram.base,
            self.plan.stride,
            b.status,
            self._request_seq,
        )
        return Copies(b.miss_count, b.miss_slots, self._scratch, b.sources)


def into(held: Tensor | None, ids: NDArray[np.int16] | None, device: torch.device) -> tuple[Tensor | None, bool]:
    """Copy `ids` to the device, into `held` if its shape fits; return the tensor and whether it moved."""
    if ids is None:
        return held, False
    fresh = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int16))
    if held is not None and held.shape == fresh.shape:
        return held.copy_(fresh), False
    return fresh.to(device), True
