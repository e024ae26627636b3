"""The decode step through Triton's interpreter: a whole token, launch for launch what the graph captures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close
from tiny import FAMILIES, reference, saved

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the graph itself", allow_module_level=True)

from offmoe.cache.policies.echo import Echo
from offmoe.kernels.ring import ABORTED, DONE
from offmoe.kvcache import KVCache
from offmoe.models.device_trunk import DeviceTrunk
from offmoe.models.model import open_model
from offmoe.plan import make_plan
from offmoe.settings import Sampling, Settings
from offmoe.states import NOWHERE
from offmoe.step import DecodeStep, Variant
from offmoe.vram import VramStore

IDS = [5, 17, 3, 60, 9, 33]


@contextmanager
def step_of(path: Path, **settings: Any) -> Iterator[DecodeStep]:
    model = open_model(path)
    prefetch = settings.pop("prefetch", "none")
    plan = make_plan(model, Settings.of(**{"device": "cpu", "ctx": 32, "ram": "64MiB", **settings}))
    plan = replace(plan, prefetch=prefetch)
    store = VramStore(model, plan)
    store.records.fill_(0xFF)  # NaN
    store.ram.fill()
    store.ram.wait_complete()
    trunk = DeviceTrunk(model, plan.device, torch.float32, plan.ctx)
    trunk.load_layers(lambda *_: None)
    step = DecodeStep(plan, trunk, store, KVCache(model.config, plan.ctx, plan.device, torch.float32))
    if plan.all_in_slots:
        store.preload(lambda *_: None)
    yield step
    store.close()
    model.checkpoint.close()


def run(step: DecodeStep, variant: Variant) -> torch.Tensor:
    """Logits [T, V] after each of IDS, teacher-forced."""
    b = step.buffers
    step.set_sampling(Sampling(temperature=0.0), [], frozenset(), 100)
    step.push(0, 0)
    step.table.clock[0] += 1
    b.position += 1  # as the first `choose` would
    rows = []
    for id in IDS:
        b.token[0] = id
        step.launch(variant)
        rows.append(b.logits[0].clone())
        row = step.ring.poll(len(rows) - 1)
        assert row is not None
        assert row.token == int(rows[-1].argmax())
        assert row.hits + row.misses + row.late == step.routed
    step.pull()
    step.store.check()
    return torch.stack(rows)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, scope: str, tmp_path: Path) -> None:
    want, _ = reference(family, IDS)
    with step_of(saved(family, tmp_path), vram="60%", scope=scope, policy="crf:h=16") as step:
        assert_close("logits", run(step, Variant()), want, 1e-5)


@pytest.mark.parametrize("prefetch", ["none", "gate:d=1,p=0,n=2", "gate:d=2,p=0,n=1"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "glm4_moe-groups"])
def test_prefetching_changes_no_logit(family: str, prefetch: str, tmp_path: Path) -> None:
    """Layers ahead are counted among those with experts."""
    want, _ = reference(family, IDS)
    with step_of(saved(family, tmp_path), vram="75%", prefetch=prefetch) as step:
        got = run(step, Variant(prefetch=prefetch != "none"))
        assert_close("logits", got, want, 1e-5)
        assert bool(step.table.landed.any()) == (prefetch != "none"), "nothing was prefetched"


@pytest.mark.parametrize(
    ("family", "scope"), [("qwen3_moe", "layer"), ("qwen3_moe", "global"), ("qwen2_moe-sparse", "layer")]
)
def test_echo_hears_every_token(family: str, scope: str, tmp_path: Path) -> None:
    """A whole step's launches leave what the host's policy makes of the same ids; a step behind the end adds none."""
    want, _ = reference(family, IDS)
    with step_of(saved(family, tmp_path), vram="60%", scope=scope, policy="echo:h=3,w=16") as step:
        assert_close("logits", run(step, Variant()), want, 1e-5)
        heard, c = step.store.table.policy, step.config
        assert isinstance(heard, Echo)
        told = Echo(heard.records, h=3, w=16)
        for now in range(len(IDS)):
            ids = step.ring.row(now).ids
            told.touch((ids + np.arange(c.places)[:, None] * c.experts).ravel(), now)
        with step.idle():
            step.launch(Variant())
        step.pull()
        assert heard.filled == told.filled == len(IDS)
        assert (heard.rows == told.rows).all()
        assert heard.foretold.any()
        assert (heard.foretold == told.foretell()).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_an_idle_launch_changes_nothing(family: str, tmp_path: Path) -> None:
    """As a graph is captured, perhaps between a prompt and its first token."""
    with step_of(saved(family, tmp_path), vram="60%") as step:
        run(step, Variant())
        step.push(7, 2)
        keys = [tensor for layer in step.config.attended for tensor in step.kv.layer(layer)]
        states = [step.kv.states.memory, step.kv.states.recent] if step.kv.states else []
        state = [*keys, *states, step.table.owner, step.table.a, step.table.b, step.table.clock,
                 step.buffers.position, step.buffers.status, step.ring.memory, step.store.records]  # fmt: skip
        before = [tensor.clone() for tensor in state]
        with step.idle():
            step.launch(Variant())
        assert all(torch.equal(old, new) for old, new in zip(before, state, strict=True))


def test_steps_behind_the_end_leave_the_state(tmp_path: Path) -> None:
    """A launch that was under way when the answer ended: as if only the steps before it had run."""
    with step_of(saved("qwen3_next", tmp_path), vram="60%") as step:
        run(step, Variant())
        states, b = step.kv.states, step.buffers
        assert states is not None
        before = states.memory.clone(), states.recent.clone()
        assert step.stands == len(IDS)
        b.status.fill_(DONE)
        step.launch(Variant())
        assert torch.equal(states.memory, before[0])
        assert torch.equal(states.recent, before[1])
        assert step.stands == len(IDS)
        b.status.fill_(ABORTED)
        assert step.stands == NOWHERE
