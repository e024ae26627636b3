"""Chunks of a prompt through the GPU's path, with its kernels interpreted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offmoe.experts.vram_store import VramStore
from offmoe.models.model import open_model
from offmoe.plan import make_plan
from offmoe.prefill import compile_prompt_kernels, feed_forward
from offmoe.settings import Settings
from offmoe.trunk.device_trunk import DeviceTrunk
from offmoe.trunk.kv_cache import KVCache

IDS = [5, 17, 3, 60, 9, 33, 2, 71, 14, 8]


def chunk_logits(trunk: DeviceTrunk, store: VramStore, kv: KVCache, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] after each of `ids`, which go on from where the cache stands."""
    store.begin(len(ids))
    x, start = trunk.embed(torch.tensor(ids)), len(kv.tokens)
    for layer in range(trunk.config.layers):
        x = x + trunk.attend(layer, x, kv, start)
        x = feed_forward(trunk, store, layer, x)
    kv.tokens += ids
    return trunk.logits(x)


def prefill(path: Path, chunk: int, batch: int, **settings: Any) -> torch.Tensor:
    """Logits [T, V]; slots hold NaN before they are filled."""
    model = open_model(path)
    plan = make_plan(model, Settings.of(**{"device": "cpu", "ctx": 32, "ram": "64MiB", **settings}))
    store = VramStore(model, replace(plan, batch=batch))
    store.slot_memory.fill_(0xFF)
    trunk = DeviceTrunk(model, plan.device, torch.float32, plan.ctx)
    trunk.load_layers(lambda *_: None)
    kv = KVCache(model.config, plan.ctx, plan.device, torch.float32)
    if plan.all_in_slots:
        store.preload(lambda *_: None)
    elif plan.ram_rows >= model.records:
        store.ram.fill()
    if batch == 2:  # interpreted kernels run, and nothing may come of it
        compile_prompt_kernels(trunk, store, kv)
    rows = [chunk_logits(trunk, store, kv, IDS[at : at + chunk]) for at in range(0, len(IDS), chunk)]
    store.check()
    store.close()
    model.checkpoint.close()
    return torch.cat(rows)
