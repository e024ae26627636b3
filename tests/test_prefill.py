"""A prompt's chunk through the GPU's path, its kernels interpreted: experts that stream past, stay or were there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, reference, saved

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the engine itself", allow_module_level=True)


from offmoe.experts.vram_store import VramStore
from offmoe.models.model import open_model
from offmoe.plan import make_plan
from offmoe.prefill import compile_prompt_kernels, feed_forward
from offmoe.settings import Settings
from offmoe.trunk.device_trunk import DeviceTrunk
from offmoe.trunk.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("whole_model")
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("chunk", "batch", "vram"), [(10, 2, "50%"), (4, 8, "60%"), (5, 3, "100%")])
def test_logits_are_those_of_transformers(family: str, chunk: int, batch: int, vram: str, tmp_path: Path) -> None:
    reference(family, IDS).check_logits(prefill(saved(family, tmp_path), chunk, batch, vram=vram))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_is_resident_changes_no_bit(scope: str, tmp_path: Path) -> None:
    path = saved("qwen3_moe", tmp_path)
    rows = [prefill(path, 5, batch, vram=vram, scope=scope) for batch, vram in ((1, "40%"), (3, "75%"), (8, "100%"))]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[0], prefill(path, 5, 2, vram="50%", ram=0)), "out of a RAM tier that is too small"


def test_with_all_in_slots_the_host_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so has no need to wait for a router."""
    asked, access = [], VramStore.access
    monkeypatch.setattr(
        VramStore, "access", lambda self, layer, *rest: asked.append(layer) or access(self, layer, *rest)
    )
    prefill(saved("qwen3_moe", tmp_path), 5, 3, vram="100%")
    assert asked == sorted(set(asked)), "once a layer, when the slots were filled"
