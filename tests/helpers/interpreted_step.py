"""The decode step with its kernels interpreted: what the graph captures, launched token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offmoe.decode.step import DecodeStep
from offmoe.decode.variant import Variant
from offmoe.experts.vram_store import VramStore
from offmoe.models.model import open_model
from offmoe.plan import make_plan
from offmoe.settings import Sampling, Settings, parse_prefetch
from offmoe.trunk.device_trunk import DeviceTrunk
from offmoe.trunk.kv_cache import KVCache

IDS = [5, 17, 3, 60, 9, 33]


@contextmanager
def step_of(path: Path, **settings: Any) -> Iterator[DecodeStep]:
    model = open_model(path)
    config = model.config.with_moe(rule=settings.pop("rule", model.config.moe.rule))
    model, prefetch = replace(model, config=config), parse_prefetch(settings.pop("prefetch", "none"))
    int8 = settings.pop("int8", False)
    plan = make_plan(model, Settings.of(**{"device": "cpu", "ctx": 32, "ram": "64MiB", **settings}))
    plan = replace(plan, prefetch=prefetch)
    store = VramStore(model, plan)
    store.slot_memory.fill_(0xFF)  # NaN
    store.ram.fill()
    store.ram.wait_complete()
    trunk = DeviceTrunk(model, plan.device, torch.float32, plan.ctx)
    trunk.load_layers(lambda *_: None)
    step = DecodeStep(plan, trunk, store, KVCache(model.config, plan.ctx, plan.device, torch.float32, int8))
    if plan.all_in_slots:
        store.preload(lambda *_: None)
    yield step
    store.close()
    model.checkpoint.close()


def run(step: DecodeStep, variant: Variant, routed: int | None = None) -> torch.Tensor:
    """Logits [T, V] after each of IDS, teacher-forced; `routed`: to so many records, where not to k in every layer."""
    b = step.buffers
    step.buffers.set_sampling(Sampling(temperature=0.0), [], frozenset(), 100)
    step.push(0, len(step.kv.tokens))
    step.table.clock[0] += 1
    b.position += 1  # as the first `choose` would
    rows, seen = [], 0
    for id in IDS:
        b.token[0] = id
        step.launch(variant)
        rows.append(b.logits[0].clone())
        row = step.ring.poll(len(rows) - 1)
        assert row is not None
        assert row.token == int(rows[-1].argmax())
        seen += row.routed
        assert (row.ids >= 0).sum() == row.routed <= step.routed
    assert seen == (len(IDS) * step.routed if routed is None else routed)
    step.pull()
    step.store.check()
    return torch.stack(rows)
