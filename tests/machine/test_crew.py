"""A crew's threads change no bit of a prompt, end with it, and report what failed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_engines import engine_of
from tiny_models import saved

from offmoe import prefill
from offmoe.machine.crew import ROWS, crew, product, share, shared

IDS = torch.randint(3, 96, (200,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_all_tasks_run_on_threads_of_their_own() -> None:
    ran: list[tuple[int, int]] = []
    with crew(2):
        assert shared()
        share(partial(lambda i: ran.append((i, threading.get_ident())), i) for i in range(20))
    assert not shared()
    assert sorted(i for i, _ in ran) == list(range(20))
    assert threading.get_ident() not in {thread for _, thread in ran}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("offmoe-crew")]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_error_is_raised(threads: int) -> None:
    done: list[int] = []
    with crew(threads), pytest.raises(ZeroDivisionError):
        share([lambda: done.append(1), lambda: 1 / 0])
    assert done == [1]
    assert not shared()


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1, 3 * ROWS])
def test_products(rows: int) -> None:
    x, weight = torch.randn(rows, 48), torch.randn(48, 40)
    want = x.double() @ weight.double()
    alone = product(x, weight)
    with crew(2):
        assert torch.equal(product(x, weight), alone)
    assert (alone - want).square().mean().sqrt() < 1e-6 * want.square().mean().sqrt()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text-chunked", "qwen3_next"])
def test_the_number_of_threads_changes_no_bit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, sinks and latents are cut into blocks of rows however many threads there are."""
    made: list[int] = []
    monkeypatch.setattr(prefill, "crew", lambda threads: made.append(threads) or crew(threads))
    with engine_of(saved(family, tmp_path), ctx=256, chunk=200, vram="60%") as engine:
        both = engine.prefill(IDS)
        assert made == [2]
        torch.set_num_threads(1)
        engine.reset()
        assert torch.equal(engine.prefill(IDS), both)
        assert made == [2, 1]
        engine.reset()
        engine.prefill(IDS[: prefill.CREW_TOKENS - 1])
        assert made[-1] == 1, "a short prompt is run by one thread"


@pytest.mark.usefixtures("two_threads")
def test_a_forked_child_has_a_crew_of_its_own(tmp_path: Path) -> None:
    with engine_of(saved("qwen3_moe", tmp_path), ctx=256, chunk=200) as engine:
        want = engine.prefill(IDS)
        if (child := os.fork()) == 0:
            engine.reset()
            os._exit(0 if torch.equal(engine.prefill(IDS), want) else 1)
        assert os.waitpid(child, 0)[1] == 0
