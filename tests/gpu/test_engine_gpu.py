"""The engine on a real GPU: the captured graph gives the same tokens whatever the placement, and the CPU's logits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from teacher_forcing import graph_logits
from tolerance import assert_close

from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import FORMATS, dequantise

PROMPT = "Tell me a short story about a fox who learns to share. Use simple words, and end with a moral."
RAM = {"all": "64MiB", "half": 480 * 31232, "none": 0}
PREFETCH = ("none", "gate:d=1,p=0.02,n=2", "gate:d=2,p=0,n=4")


def demo(**settings: Any) -> Engine:
    """On the GPU unless said otherwise; slots that were never filled hold NaN scales (0xFFFF)."""
    engine = Engine.load(str(DEMO), **{"device": "cuda", "ctx": 256, "chunk": 16, **settings})
    if engine.plan.device.type == "cuda" and not engine.plan.all_in_slots:
        engine.store.slot_memory.fill_(0xFF)
    return engine


def greedy(engine: Engine, count: int = 24) -> list[int]:
    list(engine.generate(PROMPT, temperature=0.0, max_tokens=count))
    engine.store.check()
    return engine.answer_tokens


@cache
def expected(dtype: str = "bf16") -> list[int]:
    with demo(dtype=dtype) as engine:
        return greedy(engine)


@pytest.mark.parametrize("ram", RAM)
@pytest.mark.parametrize(
    ("policy", "scope"), [*itertools.product(("lru", "crf:h=16"), ("layer", "global")), ("lfru", "layer")]
)
@pytest.mark.parametrize("vram", ["31.25%", "50%"])
def test_greedy_tokens_do_not_depend_on_placement(vram: str, policy: str, scope: str, ram: str) -> None:
    with demo(vram=vram, policy=policy, scope=scope, ram=RAM[ram]) as engine:
        assert greedy(engine) == expected()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("vram", ["50%", "75%"])
def test_greedy_tokens_do_not_depend_on_prefetching(vram: str, prefetch: str, scope: str) -> None:
    """Long enough for the guard to have tried both ways."""
    with demo(vram=vram, prefetch=prefetch, scope=scope, dtype="f32") as engine, demo(dtype="f32") as whole:
        engine.store.ram.wait_complete()
        assert greedy(engine, 120) == greedy(whole, 120)
        stats = engine.stats()
        if prefetch != "none" and stats.tokens > 40:
            assert stats.covered + stats.late > 0, "nothing was prefetched"


def test_the_same_answer_twice_and_a_second_turn() -> None:
    with demo(vram="50%") as engine:
        assert greedy(engine) == greedy(engine) == expected()
        assert engine.stats().reused_tokens > 0
        assert "Paris" in "".join(p.text for p in engine.generate("What is the capital of France?", temperature=0.0))
        texts = [[p.text for p in engine.generate(PROMPT, temperature=1.0, seed=s, max_tokens=16)] for s in (5, 5, 6)]
        assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("dtype", "ratio"), [("f32", 1e-4), ("bf16", 5e-2)])
def test_logits_are_those_of_the_cpu(dtype: str, ratio: float) -> None:
    """Teacher-forced; in bf16 routing flips now and then, which is most of the difference."""
    with demo(device="cpu", dtype="f32") as cpu, demo(dtype=dtype, vram="50%") as gpu:
        ids, tokens = cpu.prompt_ids(PROMPT), expected()
        want = torch.stack([cpu.prefill(ids)] + [cpu.step(token) for token in tokens])
        assert_close(f"{dtype} logits", graph_logits(gpu, ids, tokens), want, ratio)


def test_the_graph_gives_the_tokens_of_the_cpu_in_float32() -> None:
    with demo(device="cpu", dtype="f32") as cpu, demo(dtype="f32", vram="50%") as gpu:
        assert greedy(gpu, 48) == greedy(cpu, 48)


def test_int8_keys_and_values_are_close() -> None:
    with demo(kv="int8", vram="50%", dtype="f32") as gpu, demo(dtype="f32") as exact:
        ids, tokens = gpu.prompt_ids(PROMPT), expected("f32")
        assert gpu.plan.kv_bytes < 0.6 * exact.plan.kv_bytes
        assert_close("int8", graph_logits(gpu, ids, tokens), graph_logits(exact, ids, tokens), 8e-2)


def test_two_turns_import_no_compiler_of_torch() -> None:
    """4 s."""
    code = """
import sys
from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
with Engine.load(str(DEMO), device="cuda", vram="50%", ctx=512, chunk=16) as engine:
    said = "".join(p.text for p in engine.generate("Who are you?", temperature=0.0, max_tokens=8))
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": said},
             {"role": "user", "content": "And what can you do?"}]
    list(engine.generate(turns, temperature=0.0, max_tokens=8))
    assert engine.stats().reused_tokens
sys.exit("torch._dynamo" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()


def test_the_context_ends_an_answer() -> None:
    with demo(vram="50%", ctx=64) as engine:
        list(engine.generate(PROMPT, temperature=0.0))
        stats = engine.stats()
        assert stats.finish_reason in ("context", "stop")
        assert stats.prompt_tokens + stats.tokens <= 65
        assert "Paris" in "".join(p.text for p in engine.generate("What is the capital of France?", temperature=0.0))


def test_statistics_count_every_routed_record() -> None:
    with demo(vram="50%") as engine:
        engine.store.ram.wait_complete()
        greedy(engine)
        stats = engine.stats()
        assert stats.misses_per_token == pytest.approx(300 * (1 - stats.hit_rate))
        assert stats.pcie_bytes_per_token == pytest.approx(stats.misses_per_token * 31104)
        assert 0 < stats.hit_rate < 1
        assert stats.roof is not None


def test_the_floor_is_known_beside_prefetching() -> None:
    """It was 0: what is predicted of forced routing is wrong, and took the slots of what would have hit."""
    with demo(vram="50%", prefetch="gate:d=1,p=0.02,n=4") as engine:
        engine.store.ram.wait_complete()
        greedy(engine, 64)
        floor, token = engine.decoder.floor_s, 1 / engine.stats().decode_tok_s
        assert floor is not None
        assert 0 < floor < 2 * token  # the first tokens compile
        assert greedy(engine, 64)


def test_a_dead_disk_is_an_error_and_the_next_answer_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from offmoe.machine import disk_reader as transfer

    with demo(vram="50%", ram=0) as engine:
        tokens = greedy(engine)
        read = transfer.read_fully
        engine.reset()
        engine.prefill(engine.prompt_ids(PROMPT))

        def broken(*arguments: Any) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(transfer, "read_fully", broken)
        with pytest.raises(OffmoeError):
            greedy(engine, 100)
        monkeypatch.setattr(transfer, "read_fully", read)
        engine.reset()
        assert greedy(engine) == tokens


@pytest.mark.parametrize("fmt", FORMATS)
def test_dequantisers_give_the_cpus_bits(fmt: str) -> None:
    form = FORMATS[fmt]
    raw = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, form.nbytes(4, 512)), np.uint8))
    got = dequantise(raw.cuda(), fmt, 4, 512).cpu()
    want = dequantise(raw, fmt, 4, 512)
    assert torch.equal(got.view(torch.int32)[~want.isnan()], want.view(torch.int32)[~want.isnan()])


def test_too_little_vram_names_what_would_work() -> None:
    with pytest.raises(OffmoeError, match="the smallest that works is"):
        demo(vram="1MiB")
