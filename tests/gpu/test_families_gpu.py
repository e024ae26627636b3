"""Every family on a real GPU, tiny and random: the captured graph against the eager path and against the CPU.

No reference from outside: tests/test_models.py compares the CPU with transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_forcing import graph_logits
from tiny_models import FAMILIES, saved
from tolerance import assert_close

from offmoe.engine import Engine
from offmoe.mixers.heads import cache as head_cache
from offmoe.models.model import open_model
from offmoe.settings import Settings

pytestmark = [
    pytest.mark.parametrize("family", FAMILIES),
]
IDS = torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(7)).tolist()
PROMPT = 110
SLACK = 68  # a ring of 72 positions, which the prompt passes, and the longest chunk too


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_cache, "SLACK", SLACK)


def engine_of(path: Path, **settings: Any) -> Engine:
    chosen = {"device": "cuda", "ctx": 256, "chunk": 100, "ram": "64MiB", **settings}
    engine = Engine(open_model(path), Settings.of(**chosen))
    if engine.plan.device.type == "cuda" and not engine.plan.all_in_slots:
        engine.store.slot_memory.fill_(0xFF)  # NaN where nothing was filled in
    return engine


def in_bf16(path: Path) -> Path:
    """The same model with its floats rounded, so that no path rounds weights."""
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    rounded = {name: t.bfloat16() if t.dtype == torch.float32 else t for name, t in load_file(file).items()}
    save_file(rounded, file)
    return path


def eager_logits(engine: Engine, ids: list[int], tokens: list[int]) -> torch.Tensor:
    rows = [engine.prefill(ids).clone()] + [engine.step(token).clone() for token in tokens]
    return torch.stack(rows).float().cpu()


def greedy(engine: Engine) -> list[int]:
    list(engine.generate(IDS[:PROMPT], temperature=0.0, max_tokens=32))
    engine.store.check()
    return engine.answer_tokens


@pytest.mark.parametrize("vram", ["60%", "100%"])
def test_greedy_tokens_are_those_of_the_cpu_in_float32(family: str, vram: str, tmp_path: Path) -> None:
    path = saved(family, tmp_path)
    with engine_of(path, device="cpu", dtype="f32") as cpu, engine_of(path, dtype="f32", vram=vram) as gpu:
        want = greedy(cpu)
        assert len(want) == 32
        assert greedy(gpu) == want
        gpu.reset()
        assert greedy(gpu) == want


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_graph_gives_the_logits_of_the_eager_path(family: str, dtype: str, tmp_path: Path) -> None:
    """In bf16 as close as 2e-2, or where a tiny model magnifies rounding more than that, as close to each other as
    the eager path is to float32; the median of positions, since a routing that flips at a tie changes one wholly."""
    path, tokens = in_bf16(saved(family, tmp_path)), IDS[PROMPT:]
    with engine_of(path, dtype=dtype, vram="60%") as graph, engine_of(path, dtype=dtype, vram="100%") as eager:
        got, want = graph_logits(graph, IDS[:PROMPT], tokens), eager_logits(eager, IDS[:PROMPT], tokens)
    if dtype == "f32":
        assert_close("logits", got, want, 1e-4)
        return
    with engine_of(path, device="cpu", dtype="f32") as cpu:
        exact = eager_logits(cpu, IDS[:PROMPT], tokens)
    assert median_ratio(got, want) <= max(2e-2, 1.5 * median_ratio(want, exact))


def median_ratio(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the median over positions of RMS error / RMS value of all."""
    assert got.isfinite().all()
    return float((got - want).square().mean(1).sqrt().median() / want.square().mean().sqrt())


def test_a_prompt_compiles_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its length, and where it begins: all was compiled at the start. But for what tiny rows of no whole 16
    bytes need."""
    from triton import JITFunction

    compiled: list[str] = []
    make = JITFunction._do_compile

    def counted(kernel: JITFunction, *arguments: Any) -> Any:
        compiled.append(kernel.__name__)
        return make(kernel, *arguments)

    for dtype in ("bf16", "f32"):
        with (
            engine_of(saved(family, tmp_path / dtype), dtype=dtype, vram="60%", chunk=64) as gpu,
            monkeypatch.context() as patch,
        ):
            patch.setattr(JITFunction, "_do_compile", counted)
            for length in (1, 2, 17, 63, 64, 65, 100, 149):
                gpu.reset()
                gpu.prefill(IDS[:length])
                gpu.prefill(IDS[: length + 1])
            narrow = any(gpu.config.mixers[layer].projected % 8 for layer in gpu.config.recurrent)
    assert not compiled or narrow


def test_a_second_turn_begins_where_a_window_still_reaches(family: str, tmp_path: Path) -> None:
    """Prefixes that are reused, or run again where rings have lost them, give the tokens of a fresh start."""
    with engine_of(saved(family, tmp_path), dtype="f32", vram="60%") as gpu:
        greedy(gpu)
        gpu.stats()  # measures the floor: steps that nobody reads
        for common in (100, 60, 10):
            ids = [*IDS[:common], 9, 8, 7, 6]
            list(gpu.generate(ids, temperature=0.0, max_tokens=16))
            turn = gpu.answer_tokens
            gpu.reset()
            list(gpu.generate(ids, temperature=0.0, max_tokens=16))
            assert gpu.answer_tokens == turn, common
