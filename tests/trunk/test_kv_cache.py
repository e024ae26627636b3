"""Layers that look at a window keep little more than it: the same logits, and no prefix reused that they have lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import reference, saved

from offmoe.engine import Engine
from offmoe.mixers.heads import cache as head_cache
from offmoe.models.model import open_model
from offmoe.settings import Settings
from offmoe.trunk.kv_cache import KVCache, kv_nbytes

IDS = torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(3)).tolist()
SLACK, WINDOW, CTX = 20, 4, 256


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rings of 24 positions, which no chunk of 30 fits."""
    monkeypatch.setattr(head_cache, "SLACK", SLACK)
    with Engine(open_model(saved("gpt_oss", tmp_path)), Settings.of(device="cpu", ctx=CTX, chunk=30)) as engine:
        assert rooms(engine) == [24, 256, 24, 256]
        yield engine


def rooms(engine: Engine) -> list[int]:
    return [cache.room for cache in engine.kv.caches]


def test_logits_behind_many_windows(engine: Engine) -> None:
    want = reference("gpt_oss", IDS)
    rows = [engine.prefill(IDS[:100])] + [engine.step(token) for token in IDS[100:]]
    want.check_logits(torch.stack(rows), 99)
    assert engine.kv.caches[0].keys.shape == (2, 24, 32)
    assert engine.kv.caches[1].keys.shape == (2, 256, 32)


def test_logits_behind_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of attention, of seven positions each, cut across those of a prompt."""
    monkeypatch.setattr(head_cache, "SLACK", 5)
    want = reference("llama4_text-chunked", IDS)
    model = open_model(saved("llama4_text-chunked", tmp_path))
    with Engine(model, Settings.of(device="cpu", ctx=CTX, chunk=10)) as engine:
        assert rooms(engine) == [12, 12, 256, 12]
        rows = [engine.prefill(IDS[:100])] + [engine.step(token) for token in IDS[100:]]
        want.check_logits(torch.stack(rows), 99)


@pytest.mark.parametrize(
    ("written", "common", "reused"),
    [(80, 80, 80), (80, 59, 59), (80, 58, 0), (80, 30, 0), (80, 0, 0), (60, 39, 39), (60, 38, 0)],
)
def test_a_prefix_is_run_again_where_a_window_has_lost_it(
    engine: Engine, written: int, common: int, reused: int
) -> None:
    """The ring holds positions from 56 on, all that a token at 59 sees; 60 end with a chunk longer than the ring."""
    engine.prefill(IDS[:written])
    ids = [*IDS[:common], 5, 6, 7, 8]
    want = reference("gpt_oss", ids)
    assert engine.kv.reuse(ids) == reused
    want.check_logits(engine.prefill(ids)[None], -1)
    again = [*ids, 9]
    assert engine.kv.reuse(again) == len(ids)
    reference("gpt_oss", again).check_logits(engine.prefill(again)[None], -1, name="the next turn")


def test_what_a_failed_chunk_wrote_is_not_reused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.prefill(IDS[:60])
    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "apply", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.prefill(IDS[:90])
    assert engine.kv.tokens == IDS[:60]
    assert engine.kv.reuse(IDS[:61]) == 0


def test_steps_that_nobody_read_are_counted(engine: Engine) -> None:
    engine.prefill(IDS[:60])
    engine.kv.wrote(80)
    assert engine.kv.reuse(IDS[:61]) == 60
    engine.kv.wrote(82)
    assert engine.kv.reuse(IDS[:61]) == 0


def test_a_cache_is_as_large_as_the_plan_says(engine: Engine) -> None:
    for int8 in (False, True):
        kv = KVCache(engine.config, CTX, torch.device("cpu"), torch.float32, int8)
        held = [tensor for cache in kv.caches for tensor in cache.tensors()]
        assert sum(tensor.nbytes for tensor in held) == kv_nbytes(engine.config, CTX, 4, int8)
