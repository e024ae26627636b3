"""The same question gives the same answer whatever was asked before, in every type, greedily and with a seed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from asked_before import ask, check_asked_before, questions
from exhaustive import cases
from tiny_engines import engine_of
from tiny_models import FAMILIES, TELLING, saved

from offmoe.engine import Engine
from offmoe.mixers.heads import cache as head_cache

IDS = torch.randint(3, 96, (120,), generator=torch.Generator().manual_seed(8)).tolist()
LENGTHS = (1, 17, 48, 77)
CHUNK = 16
TYPES = [*itertools.product(("bf16", "f16", "f32"), ("55%", "100%"))]
STATEFUL = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next")  # whole contexts, windows, latents, recurrent states


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are lost now and then."""
    monkeypatch.setattr(head_cache, "SLACK", 24)


def engine(path: Path, dtype: str, vram: str = "55%", **settings: Any) -> Engine:
    return engine_of(path, **{"ctx": 128, "chunk": CHUNK, "dtype": dtype, "vram": vram, "ram": "64MiB", **settings})


@pytest.mark.parametrize(("dtype", "vram"), cases(TYPES, [("bf16", "55%"), ("f16", "100%"), ("f32", "55%")]))
@pytest.mark.parametrize("family", cases(FAMILIES, TELLING))
def test_what_was_asked_before_changes_no_answer(family: str, dtype: str, vram: str, tmp_path: Path) -> None:
    with engine(saved(family, tmp_path), dtype, vram) as asked:
        prompts = questions(IDS, LENGTHS)
        reused = check_asked_before(asked, prompts, 4, exact=dtype != "f32")
        if dtype != "f32" or not asked.kv.states:  # float32's snapshots lie 32 tokens before an end
            assert max(reused) == max(map(len, prompts)), "an exact repeat runs nothing"
        asked.store.check()


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("family", STATEFUL)
def test_a_conversation_goes_on_as_if_it_began_anew(family: str, dtype: str, tmp_path: Path) -> None:
    """Its answers are run again as part of the next prompt, from the last multiple of a chunk on."""
    path = saved(family, tmp_path)
    with engine(path, dtype) as talking, engine(path, dtype, "100%") as other:
        turns: list[int] = []
        for turn in range(4):
            turns += IDS[23 * turn : 23 * turn + 23]
            got = ask(talking, turns, 5)
            other.reset()
            want = ask(other, turns, 5)
            assert got.tokens == want.tokens
            if dtype == "bf16":
                assert torch.equal(got.logits, want.logits)
                assert got.reused % CHUNK == 0
            turns += got.tokens
        assert got.reused >= 48, "a snapshot lies a chunk before a prompt's end, or further"


@pytest.mark.parametrize("family", STATEFUL)
def test_what_was_broken_off_changes_no_answer(family: str, tmp_path: Path) -> None:
    """Between any two chunks of a prompt, and after any token."""
    with engine(saved(family, tmp_path), "bf16") as broken:
        want = ask(broken, IDS[:77], 5)
        for at in range(10):
            other = IDS[:40] + IDS[80:110]  # five chunks, then tokens
            for count, _ in enumerate(stopping(broken, other, after=at), at - 4):
                if count >= 0:
                    break
            got = ask(broken, IDS[:77], 5)
            assert torch.equal(got.logits, want.logits), at
            assert got.tokens == want.tokens


def stopping(engine: Engine, ids: list[int], after: int) -> Any:
    """Answer `ids`, and cancel while chunk number `after` runs."""
    run, chunks = engine.forward._run, iter(range(100))

    def counted(some: list[int]) -> torch.Tensor:
        if len(some) > 1 and next(chunks) == after:
            engine.cancel()
        return run(some)

    engine.forward._run = counted  # type: ignore[method-assign]
    try:
        yield from engine.generate(ids, temperature=0.0, max_tokens=6)
    finally:
        engine.forward._run = run  # type: ignore[method-assign]


def test_a_chunk_that_fails_leaves_no_wrong_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(saved("qwen3_next", tmp_path), "bf16") as failing:
        want = ask(failing, IDS[:77], 5)
        with monkeypatch.context() as patch:
            patch.setattr(failing.trunk, "logits", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                failing.prefill(IDS[:40])
        got = ask(failing, IDS[:77], 5)
        assert torch.equal(got.logits, want.logits)
        assert got.tokens == want.tokens


def test_a_window_that_an_answer_has_overwritten_is_run_again(tmp_path: Path) -> None:
    """Rings keep 24 positions behind their windows."""
    with engine(saved("gpt_oss", tmp_path), "bf16") as long:
        want = ask(long, IDS[:40], 4)
        assert ask(long, IDS[:40], 60).reused == 40
        got = ask(long, IDS[:40], 4)
        assert got.reused == 0
        assert torch.equal(got.logits, want.logits)
        assert got.tokens == want.tokens
