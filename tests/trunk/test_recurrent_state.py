"""Layers without keys across turns: a state that cannot be rolled back never makes another answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_engines import engine_of
from tiny_models import saved
from tolerance import assert_close

from offmoe.engine import Engine
from offmoe.mixers import recurrent as states

IDS = torch.randint(3, 96, (200,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module", params=["qwen3_next", "lfm2_moe"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("states"))


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with engine_of(path, ctx=256, chunk=64) as engine:
        yield engine


def fresh(path: Path, ids: list[int]) -> torch.Tensor:
    with engine_of(path, ctx=256, chunk=256) as engine:
        return engine.prefill(ids)


def answer(engine: Engine, ids: list[int], count: int = 8) -> list[int]:
    list(engine.generate(ids, temperature=0.0, max_tokens=count))
    return engine.answer_tokens


def same(engine: Engine, ids: list[int], path: Path) -> int:
    """The logits after `ids` are those of a fresh start; returns how many of them were run already."""
    reused = engine.kv.reuse(ids)
    assert_close("logits", engine.prefill(ids), fresh(path, ids), 1e-4)
    return reused


def test_what_follows_an_answer_goes_on_from_its_end(engine: Engine, path: Path) -> None:
    said = answer(engine, IDS[:40])
    held = len(engine.kv.tokens)
    assert same(engine, IDS[:40] + said + IDS[150:160], path) == held >= 40 + len(said) - 1


def test_what_turns_off_before_the_answer_goes_on_from_a_copy(engine: Engine, path: Path) -> None:
    """The same prompt again, and one in which the answer is told without its first tokens."""
    answer(engine, IDS[:100])
    assert same(engine, IDS[:100], path) == 100 - states.BEFORE_END
    answer(engine, IDS[:100])
    assert same(engine, IDS[:97] + IDS[180:190], path) == 100 - states.BEFORE_END
    assert same(engine, IDS[:90] + IDS[160:163], path) == 107 - states.BEFORE_END


def test_what_turns_off_before_every_copy_starts_anew(engine: Engine, path: Path) -> None:
    answer(engine, IDS[:100])
    assert same(engine, IDS[:20] + IDS[100:130], path) == 0
    assert same(engine, IDS[:20] + IDS[100:131], path) == 50, "nothing of it is taken for the earlier prompt"
    assert same(engine, IDS[:100], path) == 50 - states.BEFORE_END


def test_a_second_turn_keeps_the_copy_of_the_first(engine: Engine, path: Path) -> None:
    answer(engine, IDS[:60])
    answer(engine, IDS[:60] + IDS[100:120])
    assert same(engine, IDS[:40], path) == 60 - states.BEFORE_END


def test_an_answer_that_is_broken_off_leaves_no_wrong_state(engine: Engine, path: Path) -> None:
    pieces = engine.generate(IDS[:40], temperature=0.0)
    said = [next(pieces).token for _ in range(3)]
    pieces.close()
    assert said == engine.answer_tokens
    same(engine, IDS[:40] + engine.answer_tokens + IDS[90:95], path)


def test_a_chunk_that_fails_leaves_no_state(engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first layers have run it, its last have not."""
    answer(engine, IDS[:40])

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(engine.trunk, "logits", broken)
        with pytest.raises(RuntimeError):
            engine.prefill(IDS[:40] + engine.answer_tokens + IDS[60:70])
    assert engine.kv.states is not None
    assert engine.kv.states.at == states.NOWHERE
    assert same(engine, IDS[:40] + IDS[60:70], path) == 40 - states.BEFORE_END


def test_steps_whose_tokens_are_not_held_are_not_gone_on_from(engine: Engine, path: Path) -> None:
    """As the device runs ahead of the host that ends an answer."""
    engine.prefill(IDS[:40])
    assert engine.kv.states is not None
    engine.kv.states.memory += 1  # what two tokens more would do
    engine.kv.states.recent += 1
    engine.kv.stepped(42)
    assert same(engine, IDS[:45], path) == 40 - states.BEFORE_END
    engine.kv.stepped(45)
    assert same(engine, IDS[:50], path) == 45


def test_what_runs_in_between_is_undone(engine: Engine, path: Path) -> None:
    engine.prefill(IDS[:40])
    assert engine.kv.states is not None
    with engine.kv.untouched():
        engine.kv.states.memory += 1
        engine.kv.states.recent += 1
        engine.kv.stepped(47)
    assert same(engine, IDS[:45], path) == 40


def test_forgetting_the_conversation_forgets_its_copies(engine: Engine, path: Path) -> None:
    answer(engine, IDS[:100])
    engine.reset()
    assert_close("logits", engine.step(IDS[0]), fresh(path, IDS[:1]), 1e-4)
    engine.reset()
    assert same(engine, IDS[50:150], path) == 0


def test_the_plan_counts_the_states(engine: Engine) -> None:
    held, kv = engine.kv.states, engine.kv
    assert held is not None
    mine = held.memory.nbytes + held.recent.nbytes
    assert engine.plan.state_bytes == mine
    copies = sum(copy.memory.nbytes + copy.recent.nbytes for copy in held._snapshots)
    assert mine + copies == states.STATES * mine
    keys = [tensor for layer in engine.config.attended for tensor in kv.caches[layer].tensors()]
    assert engine.plan.kv_bytes == sum(tensor.nbytes for tensor in keys)
