"""The eager path on a real GPU: the same tokens whatever the placement, and the CPU's logits."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close

from offmoe.download import DEMO
from offmoe.engine import Engine
from offmoe.kernels.formats import FORMATS, dequantise
from offmoe.slots import PackedSlots

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
PROMPT = "Tell me a short story about a fox who learns to share. Use simple words, and end with a moral."
RAM = {"all": "64MiB", "half": 480 * 31232, "none": 0}


def demo(**settings: Any) -> Engine:
    """On the GPU unless said otherwise; slots that were never filled hold NaN scales (0xFFFF)."""
    engine = Engine.load(str(DEMO), **{"device": "cuda", "ctx": 256, "chunk": 16, **settings})
    if isinstance(engine.store.slots, PackedSlots) and not engine.plan.all_in_slots:
        engine.store.slots._records.fill_(0xFF)
    return engine


def greedy(engine: Engine) -> list[int]:
    list(engine.generate(PROMPT, temperature=0.0, max_tokens=12))
    engine.store.check()
    return engine.answer_tokens


@cache
def expected() -> list[int]:
    with demo() as engine:
        return greedy(engine)


@pytest.mark.parametrize("ram", RAM)
@pytest.mark.parametrize(("policy", "scope"), list(itertools.product(("lru", "crf:h=16"), ("layer", "global"))))
@pytest.mark.parametrize("vram", ["31.25%", "50%", "100%"])
def test_greedy_tokens_do_not_depend_on_placement(vram: str, policy: str, scope: str, ram: str) -> None:
    with demo(vram=vram, policy=policy, scope=scope, ram=RAM[ram]) as engine:
        assert greedy(engine) == expected()


@pytest.mark.parametrize(("dtype", "ratio"), [("f32", 1e-4), ("bf16", 5e-2)])
def test_logits_are_those_of_the_cpu(dtype: str, ratio: float) -> None:
    """Teacher-forced; in bf16 routing flips now and then, which is most of the difference."""
    with demo(device="cpu", dtype="f32") as cpu, demo(dtype=dtype, vram="50%") as gpu:
        ids = cpu.prompt_ids(PROMPT)
        rows = [[e.prefill(ids).cpu()] + [e.step(token).cpu() for token in expected()] for e in (cpu, gpu)]
    assert_close(f"{dtype} logits", torch.stack(rows[1]), torch.stack(rows[0]), ratio)


@pytest.mark.parametrize("fmt", FORMATS)
def test_dequantisers_give_the_cpus_bits(fmt: str) -> None:
    form = FORMATS[fmt]
    raw = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, form.nbytes(4, 512)), np.uint8))
    got = dequantise(raw.cuda(), fmt, 4, 512).cpu()
    want = dequantise(raw, fmt, 4, 512)
    assert torch.equal(got.view(torch.int32)[~want.isnan()], want.view(torch.int32)[~want.isnan()])


def test_pinned_rows_take_their_size_and_no_more() -> None:
    with demo(vram="31.25%", ram="64MiB") as engine:
        assert engine.store.ram.rows.is_pinned()
        assert engine.store.ram.rows.nbytes == engine.plan.ram_bytes == 960 * 31232


def test_too_little_vram_names_what_would_work() -> None:
    with pytest.raises(Exception, match="the smallest that works is"):
        demo(vram="1MiB")
