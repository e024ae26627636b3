"""The decode step through Triton's interpreter: a whole token, launch for launch what the graph captures."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exhaustive import cases
from packed_files import older, packed
from reference import reference_of
from tiny_engines import decoded, engine_of
from tiny_models import FAMILIES, TELLING, reference, saved, tiny
from tolerance import assert_close

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the graph itself", allow_module_level=True)

from interpreted_prefill import chunk_logits
from interpreted_step import IDS, run, step_of

from offmoe.cache.policies.echo import Echo
from offmoe.decode.step import DecodeStep
from offmoe.decode.variant import Variant
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.kernels.gpu import prefill as gpu_prefill
from offmoe.kernels.kv import dequantise, quantise
from offmoe.kernels.ring import ABORTED, DONE
from offmoe.mixers.heads import cache as head_cache
from offmoe.mixers.recurrent import NOWHERE
from offmoe.models.model import open_model
from offmoe.settings import Settings

pytestmark = pytest.mark.usefixtures("whole_model")
PLACED = [
    *((family, "layer") for family in TELLING),
    ("qwen3_moe", "global"),
]
PREFETCHERS = ("none", "gate:d=1,p=0,n=2", "gate:d=2,p=0,n=1")


@pytest.mark.parametrize(("family", "scope"), cases(product(FAMILIES, ("layer", "global")), PLACED))
def test_logits_are_those_of_transformers(family: str, scope: str, tmp_path: Path) -> None:
    with step_of(saved(family, tmp_path), vram="60%", scope=scope, policy="crf:h=16") as step:
        reference(family, IDS).check_logits(run(step, Variant()))


BEFORE = [(7 * i) % 90 + 3 for i in range(110)]
CHUNKS = [BEFORE[:8], BEFORE[8:90], BEFORE[90:]]  # one longer than the ring of 68 or 71


def prefill(step: DecodeStep, chunks: list[list[int]]) -> torch.Tensor:
    """Logits [T, V] of the last chunk."""
    return [chunk_logits(step.trunk, step.store, step.kv, chunk) for chunk in chunks][-1]


@pytest.mark.parametrize("family", cases(["gpt_oss", "llama4_text-chunked", "gemma4_text"], ["llama4_text-chunked"]))
def test_a_ring_that_has_gone_around(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks, then tokens whose windows lie across the ring's end."""
    monkeypatch.setattr(head_cache, "SLACK", 64)
    want = reference(family, BEFORE + IDS)
    with step_of(saved(family, tmp_path), vram="100%", ctx=128) as step:
        want.check_logits(prefill(step, CHUNKS), 90, 110, "the prompt's")
        want.check_logits(run(step, Variant()), 110)
        assert step.kv.reuse(BEFORE + IDS) == 110
        assert step.kv.reuse([*BEFORE[:50], 1]) == 0, "the tokens that were run have taken its place"


@pytest.mark.parametrize("family", cases(["gpt_oss", "gemma4_text"], ["gpt_oss"]))
def test_a_ring_of_int8_is_one_of_rounded_values(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against floats that are rounded as they are read, a token's own too: a tiny model magnifies what rounding does,
    gpt-oss to 17 % and Gemma to 80 % of its logits, so nothing else can be compared."""
    monkeypatch.setattr(head_cache, "SLACK", 64)
    path = saved(family, tmp_path)
    with step_of(path, vram="100%", ctx=128, int8=True) as step:
        prompt, got = prefill(step, CHUNKS), run(step, Variant())
    attend = gpu_prefill.prefill_attention

    def rounded(q: torch.Tensor, *kept: Any, **options: Any) -> torch.Tensor:
        keys, values = (dequantise(*quantise(x), torch.float32) for x in kept[:2])
        return attend(q, keys, values, *kept[2:], **options)

    monkeypatch.setattr(gpu_prefill, "prefill_attention", rounded)
    with step_of(path, vram="100%", ctx=128) as step:
        assert_close("the prompt's", prompt, prefill(step, CHUNKS), 1e-5)
        assert_close("logits", got, prefill(step, [IDS]), 1e-5)


@pytest.mark.parametrize("fmt", cases([None, "F32", "Q8_0"], ["Q8_0"]))
def test_a_gguf_of_latent_attention_gives_the_same_logits(fmt: str | None, tmp_path: Path) -> None:
    """Its matrices of all heads in halves; in one; in one whose keys' half is transposed in float16, as on the CPU."""
    path = packed(saved("deepseek_v3-groups", tmp_path), tmp_path, "f32")
    path = older(path, tmp_path, 3, fmt) if fmt else path
    with step_of(path, vram="60%") as step:
        got = run(step, Variant())
    if fmt != "Q8_0":
        reference("deepseek_v3-groups", IDS).check_logits(got)
        return
    with engine_of(path) as engine:
        want, _ = decoded(engine, IDS, prompt=1)
    assert_close("logits", got, want, 2e-3)


@pytest.mark.parametrize(
    ("family", "prefetch"),
    cases(
        product(("qwen3_moe", "qwen2_moe", "glm4_moe-groups", "gpt_oss", "gemma4_text"), PREFETCHERS),
        [("qwen3_moe", PREFETCHERS[2]), ("qwen2_moe", PREFETCHERS[0]), ("gemma4_text", PREFETCHERS[1])],
    ),
)
def test_prefetching_changes_no_logit(family: str, prefetch: str, tmp_path: Path) -> None:
    """Layers ahead are counted among those with experts."""
    want = reference(family, IDS)
    with step_of(saved(family, tmp_path), vram="75%", prefetch=prefetch) as step:
        got = run(step, Variant(prefetch=prefetch != "none"))
        want.check_logits(got)
        assert bool(step.table.landed.any()) == (prefetch != "none"), "nothing was prefetched"


@pytest.mark.parametrize(
    ("family", "scope"),
    cases([("qwen3_moe", "layer"), ("qwen3_moe", "global"), ("qwen2_moe-sparse", "layer")], [("qwen3_moe", "global")]),
)
def test_echo_hears_every_token(family: str, scope: str, tmp_path: Path) -> None:
    """A whole step's launches leave what the host's policy makes of the same ids; a step behind the end adds none."""
    want = reference(family, IDS)
    with step_of(saved(family, tmp_path), vram="60%", scope=scope, policy="echo:h=3,w=16") as step:
        want.check_logits(run(step, Variant()))
        heard, c = step.store.table.policy, step.config
        assert isinstance(heard, Echo)
        told = Echo(heard.records, h=3, w=16)
        for now in range(len(IDS)):
            ids = step.ring.row(now).ids
            told.touch((ids + np.arange(c.moe_layers)[:, None] * c.experts).ravel(), now)
        with step.idle():
            step.launch(Variant())
        step.pull()
        assert heard.filled == told.filled == len(IDS)
        assert (heard.rows == told.rows).all()
        assert heard.foretold.any()
        assert (heard.foretold == told.foretell()).all()


@pytest.mark.parametrize("family", cases(["qwen3_moe", "qwen3_next", "lfm2_moe"], ["qwen3_next"]))
def test_an_idle_launch_changes_nothing(family: str, tmp_path: Path) -> None:
    """As a graph is captured, perhaps between a prompt and its first token."""
    with step_of(saved(family, tmp_path), vram="60%") as step:
        run(step, Variant())
        step.push(7, 2)
        keys = [tensor for layer in step.config.attended for tensor in step.kv.caches[layer].tensors()]
        states = [step.kv.states.memory, step.kv.states.recent] if step.kv.states else []
        state = [*keys, *states, step.table.owner, step.table.a, step.table.b, step.table.clock,
                 step.buffers.position, step.buffers.status, step.ring.memory, step.store.slot_memory]  # fmt: skip
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
        assert states.at == len(IDS)
        b.status.fill_(DONE)
        step.launch(Variant())
        assert torch.equal(states.memory, before[0])
        assert torch.equal(states.recent, before[1])
        step.pull()
        assert states.at == len(IDS)
        b.status.fill_(ABORTED)
        step.pull()
        assert states.at == NOWHERE


def test_a_token_may_take_every_expert(tmp_path: Path) -> None:
    path = saved("qwen3_moe", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 8}))
    want = reference_of(type(tiny("qwen3_moe")).from_pretrained(path), IDS)
    with engine_of(path, ctx=32, chunk=2) as engine:
        logits, _ = decoded(engine, IDS, prompt=3)
        want.check_logits(logits, 2, name="on the CPU")
    with step_of(path) as step:
        want.check_logits(run(step, Variant()), name="the step")
    with pytest.raises(OffmoeError, match="a token is routed to 24 records and needs them all"):
        engine_of(path, vram="95%")


def test_a_token_may_take_fewer_experts_than_the_cap(tmp_path: Path) -> None:
    """A top-p, over transformers whose router is made to do the same; what it leaves out is neither hit nor miss."""
    model, p = tiny("qwen3_moe"), 0.6

    def cut(_module: Any, _inputs: Any, out: Any) -> Any:
        logits, weights, ids = out
        share = logits.softmax(-1).gather(-1, ids)
        kept = (share.cumsum(-1) - share < p) * weights
        used.append(int((kept > 0).sum()))
        return logits, kept / kept.sum(-1, keepdim=True), ids

    used: list[int] = []
    hooks = [m.register_forward_hook(cut) for m in model.modules() if type(m).__name__.endswith("Router")]
    want = reference_of(model, IDS)
    for hook in hooks:
        hook.remove()
    used, *disturbed = (used[i : i + len(hooks)] for i in range(0, len(used), len(hooks)))
    assert disturbed == [used, used], "a near tie of the top-p, choose other inputs"
    assert len(IDS) < used[0] < 3 * len(IDS)
    opened = open_model(saved("qwen3_moe", tmp_path))
    rule = replace(opened.config.moe.rule, top_p=p)
    opened = replace(opened, config=opened.config.with_moe(rule=rule))
    with Engine(opened, Settings.of(device="cpu", ctx=32, vram="60%", chunk=2)) as engine:
        rows = [engine.prefill(IDS[:3])] + [engine.step(token) for token in IDS[3:]]
        want.check_logits(torch.stack(rows), 2, name="on the CPU")
        assert engine.store.counters.routed <= sum(used)
        engine.store.check()
    for settings in ({"vram": "60%"}, {"vram": "100%"}, {"vram": "60%", "policy": "echo:h=3,w=16"}):
        with step_of(saved("qwen3_moe", tmp_path), rule=rule, **settings) as step:
            want.check_logits(run(step, Variant(), sum(used)), name=f"{settings}")
