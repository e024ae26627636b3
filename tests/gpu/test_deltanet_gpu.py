"""Gated DeltaNet on a real GPU: its step at a real shape in a graph, a prompt's blocks, and a small model's turns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tolerance import assert_close

from offmoe.engine import Engine
from offmoe.kernels.deltanet import Delta, DeltaWeights, delta_mix
from offmoe.kernels.gpu.deltanet import delta_chunk, delta_step
from offmoe.kernels.gpu.gemv import dense
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.planes import matrix, rearrange_matrix
from offmoe.kernels.striped import stripe, unstripe
from offmoe.models.model import open_model
from offmoe.settings import Sampling, Settings

BENCH = str(ROOT / "bench")
SHAPE = Delta(key_heads=16, value_heads=32, key_dim=128, value_dim=128, taps=4)
SMALL = {"layers": 8, "hidden": 512, "heads": 4, "kv_heads": 2, "head_dim": 256, "vocab": 1024, "experts": 16,
         "top_k": 4, "inner": 256, "ctx": 1024, "key_heads": 4, "value_heads": 8}  # fmt: skip
IDS = torch.randint(0, 1024, (600,), generator=torch.Generator().manual_seed(4)).tolist()


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("pdl", [False, True])
def test_a_step_in_a_graph_is_the_naive_one(tiled: bool, pdl: bool) -> None:
    """Behind the product that it waits for; the state goes on from launch to launch."""
    if pdl and not pdl_supported(torch.device("cuda", 0)):
        pytest.skip("no programmatic dependent launch here")
    d, hidden = SHAPE, 256
    w = DeltaWeights(d, randn(4, d.channels) / 2, -randn(32).exp(), randn(32), 1 + randn(128) / 5, 1e-6, tiled)
    weight = randn(sum(d.projected), hidden, seed=2) / 16
    form = matrix("F32", len(weight), hidden)
    part = rearrange_matrix(weight.cpu().view(torch.uint8).flatten(), form).cuda(), form
    memory, recent = randn(32, 128, 128, seed=3), randn(4, d.channels, seed=4)
    ours = memory.clone(), recent.clone()
    x, projected, out = randn(1, hidden), torch.empty((1, len(weight)), device="cuda"), randn(d.values)
    position, status = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))

    def launch() -> None:
        dense(x, (part,), projected)
        delta_step(projected[0], w, *ours, position, status, out, ctx=64, pdl=pdl)

    status.fill_(1)
    launch()
    assert torch.equal(ours[0], memory), "a step behind the end left its mark"
    assert torch.equal(ours[1], recent), "a step behind the end left its mark"
    status.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for t in range(6):
        fresh = randn(1, hidden, seed=10 + t)
        x.copy_(stripe(fresh))
        position.fill_(5 + t)
        graph.replay()
        want = delta_mix(fresh @ weight.t(), w, memory, recent, 5 + t)
        assert_close(f"token {t}", unstripe(out), want[0], 1e-4)
        assert_close("memory", ours[0], memory, 1e-4)
        assert_close("recent", ours[1], recent, 1e-5)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("tiled", [False, True])
def test_a_prompt_is_the_naive_one(tiled: bool, dtype: torch.dtype, ratio: float) -> None:
    """The twin computes it in blocks."""
    d = SHAPE
    w = DeltaWeights(d, randn(4, d.channels) / 2, -randn(32).exp(), randn(32), 1 + randn(128) / 5, 1e-6, tiled)
    memory, recent = randn(32, 128, 128, seed=3), randn(4, d.channels, seed=4)
    ours = memory.clone(), recent.clone()
    x = randn(300, sum(d.projected), seed=5).to(dtype)
    want = delta_mix(x, w, memory, recent, 9)
    assert_close("out", delta_chunk(x, w, *ours, 9).float(), want, ratio)
    assert_close("memory", ours[0], memory, 1e-4)
    assert torch.equal(ours[1], recent)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, BENCH)  # for a moment: there are common names in that folder
    try:
        import shapes
    finally:
        sys.path.remove(BENCH)
    file = tmp_path_factory.mktemp("deltanet") / "small.gguf"
    shapes.write("qwen3.6-35b-a3b", file, **SMALL)
    return file


def engine_of(path: Path, **settings: Any) -> Engine:
    return Engine(open_model(path), Settings.of(**{"device": "cuda", "ctx": 1024, "chunk": 256, "dtype": "f32",
                                                   **settings}))  # fmt: skip


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with engine_of(path, vram="50%") as engine:
        yield engine


def answer(engine: Engine, ids: list[int], count: int = 24) -> list[int]:
    list(engine.generate(ids, temperature=0.0, max_tokens=count))
    return engine.answer_tokens


def same(engine: Engine, ids: list[int], path: Path) -> int:
    """The logits after `ids` are those of a fresh start; returns how many of them were run already."""
    reused = engine.kv.reuse(ids)
    with engine_of(path, vram="100%") as other:
        assert_close("logits", engine.prefill(ids), other.prefill(ids), 1e-3)
    return reused


@pytest.mark.parametrize("vram", ["30%", "100%"])
def test_the_graph_gives_the_tokens_of_the_cpu(path: Path, vram: str) -> None:
    with engine_of(path, device="cpu") as cpu, engine_of(path, vram=vram) as gpu:
        assert answer(gpu, IDS[:300], 32) == answer(cpu, IDS[:300], 32)


def test_in_bfloat16_logits_are_close(path: Path) -> None:
    with engine_of(path, device="cpu") as cpu, engine_of(path, dtype="bf16") as gpu:
        assert_close("logits", gpu.prefill(IDS[:300]).cpu(), cpu.prefill(IDS[:300]), 5e-2)


def test_turns_go_on_from_the_end_of_an_answer(engine: Engine, path: Path) -> None:
    """What the floor's steps and captured graphs run in between leaves no trace."""
    said = answer(engine, IDS[:300])
    engine.stats()
    held = len(engine.kv.tokens)
    assert same(engine, IDS[:300] + said + IDS[500:520], path) == held == 300 + len(said) - 1


def test_the_same_prompt_again_goes_on_from_a_copy(engine: Engine, path: Path) -> None:
    answer(engine, IDS[:200])
    assert same(engine, IDS[:200], path) == 200 - 32


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_an_answer_that_is_broken_off_leaves_no_wrong_state(engine: Engine, path: Path, tokens: int) -> None:
    """Steps were under way by then."""
    pieces = engine.generate(IDS[:200], temperature=0.0)
    for _ in range(tokens):
        next(pieces)
    pieces.close()
    same(engine, IDS[:200] + engine.answer_tokens + IDS[400:410], path)


def test_benchmark_steps_are_undone(engine: Engine, path: Path) -> None:
    engine.prefill(IDS[:200])
    engine.decoder.run(5)  # type: ignore[union-attr]
    assert same(engine, IDS[:210], path) == 200


def test_sampled_answers_repeat_by_their_seed(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=16)
    tokens = []
    for _ in range(2):
        engine.reset()
        list(engine.generate(IDS[:100], sampling))
        tokens.append(engine.answer_tokens)
    assert tokens[0] == tokens[1]
