"""The engine on the demo model: the same tokens whatever the placement, and what a conversation may count on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exhaustive import cases
from tiny_models import saved

from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.errors import ContextFull, OffmoeError
from offmoe.experts.host_store import HostStore, UnpackedSlots

PROMPT = "Tell me a short story about a fox who learns to share. Use simple words, and end with a moral."
CPU = {
    "device": "cpu",
    "ctx": 256,
    "chunk": 16,
}  # a prompt of several chunks, each routed to almost all experts
BUDGETS = ("31.25%", "50%", "100%")  # the first: 10 slots a layer for top-10
RAM = {"all": "64MiB", "half": 480 * 31232, "none": 0}


def demo(**settings: Any) -> Engine:
    return poisoned(Engine.load(str(DEMO), **{**CPU, **settings}))


def poisoned(engine: Engine) -> Engine:
    """Slots that are being filled hold NaN before, so that a product with stale bytes shows."""
    assert isinstance(engine.store, HostStore)
    slots: UnpackedSlots = engine.store.slots
    fill = slots.fill

    def fill_poisoned(numbers: torch.Tensor, *rest: Any) -> None:
        slots._gate_up[numbers] = slots._down[numbers] = float("nan")
        fill(numbers, *rest)

    slots.fill = fill_poisoned  # type: ignore[method-assign]
    return engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    with demo(vram="50%") as engine:
        yield engine
        engine.store.check()


def answer(engine: Engine, prompt: Any, **sampling: Any) -> str:
    return "".join(
        piece.text for piece in engine.generate(prompt, **{"temperature": 0.0, "max_tokens": 12, **sampling})
    )


@cache
def expected() -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and last logits with everything in slots."""
    with demo() as engine:
        answer(engine, PROMPT)
        engine.reset()  # a reused prefix would be run in other chunks
        return engine.answer_tokens, engine.prefill(engine.prompt_ids(PROMPT))


@pytest.mark.parametrize(
    ("vram", "policy", "scope", "ram"),
    cases(
        itertools.product(BUDGETS, ("lru", "crf:h=16"), ("layer", "global"), RAM),
        [
            *zip(
                BUDGETS, itertools.cycle(("crf:h=16", "lru")), itertools.cycle(("layer", "global")), RAM, strict=False
            ),
            (BUDGETS[0], "lru", "global", "none"),
            (BUDGETS[1], "crf:h=16", "layer", "all"),
        ],
    ),
)
def test_greedy_tokens_do_not_depend_on_placement(vram: str, policy: str, scope: str, ram: str) -> None:
    tokens, logits = expected()
    with demo(vram=vram, policy=policy, scope=scope, ram=RAM[ram]) as engine:
        answer(engine, PROMPT)
        engine.store.check()
        assert engine.answer_tokens == tokens
        engine.reset()
        assert torch.equal(engine.prefill(engine.prompt_ids(PROMPT)), logits), "logits equal to the bit"
        assert (engine.stats().hit_rate == 1) == (vram == "100%"), "nothing was paged: the budget does not bind"
        stats = engine.stats()
        if ram != "all":  # else a demand may have overtaken the background's read
            assert (stats.nvme_bytes_per_token > 0) == (vram != "100%"), "the RAM budget does not bind"
        assert stats.nvme_record_bytes_per_token <= stats.nvme_bytes_per_token
        assert stats.nvme_record_bytes_per_token <= stats.pcie_bytes_per_token


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_greedy_tokens_do_not_depend_on_the_chunk_size(chunk: int) -> None:
    with demo(vram="50%", chunk=chunk) as engine:
        answer(engine, PROMPT)
        assert engine.answer_tokens == expected()[0]


def test_a_wrong_record_would_change_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard above can fail: one expert taken for its neighbour."""
    (_, logits), ensure = expected(), HostStore._ensure
    monkeypatch.setattr(
        HostStore,
        "_ensure",
        lambda self, layer, *rest: np.roll(ensure(self, layer, *rest), layer == 7).tolist(),
    )
    with demo() as engine:
        assert not torch.equal(engine.prefill(engine.prompt_ids(PROMPT)), logits)


def test_the_second_turn_runs_only_what_is_new(engine: Engine) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello! How are you today?"}]
    text = answer(engine, messages, max_tokens=40)
    first = engine.stats()
    messages += [
        {"role": "assistant", "content": text, "tokens": engine.answer_tokens},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    held = list(engine.kv.tokens)
    assert "Paris" in answer(engine, messages)
    second = engine.stats()
    assert first.reused_tokens == 0
    assert second.reused_tokens == len(held) == first.prompt_tokens + first.tokens
    assert engine.kv.tokens[: len(held)] == held


def test_reuse_gives_the_tokens_of_a_fresh_start(engine: Engine) -> None:
    answer(engine, PROMPT)
    answer(engine, "Hello!")
    answer(engine, PROMPT)
    assert engine.stats().reused_tokens > 0
    assert engine.answer_tokens == expected()[0]


def test_an_answer_can_be_broken_off(engine: Engine) -> None:
    for count, _ in enumerate(engine.generate(PROMPT, temperature=0.0)):
        if count == 2:
            engine.cancel()
    assert engine.stats().finish_reason == "cancelled"
    assert engine.stats().tokens == 3
    assert engine.answer_tokens == expected()[0][:3]
    answer(engine, PROMPT)
    assert engine.answer_tokens == expected()[0], "the next answer is whole"


def test_a_closed_generator_is_cancelled(engine: Engine) -> None:
    pieces = engine.generate(PROMPT, temperature=0.0)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert engine.stats().finish_reason == "cancelled"


def test_the_context_ends_an_answer_and_refuses_a_prompt() -> None:
    with demo(vram="50%", ctx=64) as engine:
        answer(engine, PROMPT, max_tokens=None)
        stats = engine.stats()
        assert stats.finish_reason == "context"
        assert stats.prompt_tokens + stats.tokens == 65, "the last token is sampled and needs no place"
        with pytest.raises(ContextFull, match=r"needs \d+ tokens and the context holds 64") as full:
            engine.generate(PROMPT * 4)
        assert full.value.tokens > 64
        with pytest.raises(ContextFull, match="needs 65 tokens"):
            engine.prefill([5] * 65)
        assert "Paris" in answer(engine, "What is the capital of France?"), "still usable"


def test_what_is_still_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with demo(vram="50%") as engine:
        engine.store.ram.wait_complete()
        assert engine.loading() is None
        monkeypatch.setattr(engine.store.ram, "loaded", lambda: (12, 960))
        assert engine.loading() == "12 of 960 experts read: until all are, answers wait for the disk"
    with demo(vram="100%") as engine:
        assert engine.loading() is None


def test_a_seed_is_reproducible(engine: Engine) -> None:
    texts = [answer(engine, PROMPT, temperature=1.0, seed=seed) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_answer(engine: Engine) -> None:
    whole = answer(engine, PROMPT, max_tokens=40)
    cut = whole[20:26]
    assert answer(engine, PROMPT, max_tokens=40, stop=(cut,)) == whole[: whole.index(cut)]
    assert engine.stats().finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([20480], "outside the model's vocabulary of 20480"), ([-1], "outside")],
)
def test_impossible_prompts(engine: Engine, prompt: list[int], message: str) -> None:
    with pytest.raises(OffmoeError, match=message):
        engine.generate(prompt)


def test_statistics_count_every_routed_record(engine: Engine) -> None:
    with pytest.raises(OffmoeError, match="no statistics yet"):
        engine.stats()
    seen: list[tuple[int, int]] = []
    engine.store.routed = lambda layer, ids, weights: seen.append((layer, ids.size))
    answer(engine, PROMPT)
    stats = engine.stats()
    decoded = sum(size for layer, size in seen if size == 10)
    assert decoded == 11 * 30 * 10, "the first of 12 tokens comes from the prompt's logits"
    assert stats.misses_per_token == pytest.approx(300 * (1 - stats.hit_rate))
    assert stats.pcie_bytes_per_token == pytest.approx(stats.misses_per_token * 31104)
    assert stats.roof is not None
    assert stats.decode_tok_s <= stats.roof.tok_s * 1.001, "the roof lies above"


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(OffmoeError, match="unknown setting 'vrma'"):
        Engine.load(str(DEMO), vrma="1GiB")


def test_the_smallest_budget_is_named() -> None:
    with pytest.raises(OffmoeError, match=r"--vram 1 MiB holds 33 .* smallest that works is 9369600 bytes"):
        demo(vram="1MiB")
    with demo(vram=9369600, scope="layer") as engine:
        assert engine.plan.slots == 300


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OffmoeError, match="tokenizer"):
        Engine.load(str(saved("olmoe", tmp_path)), device="cpu")


def test_memory_that_does_not_suffice_shrinks_the_pool_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    build, tried = Engine._build, []

    def short(self: Engine, *rest: Any) -> None:
        tried.append(self.plan.slots)
        if self.plan.slots > 400:
            raise torch.OutOfMemoryError
        build(self, *rest)

    monkeypatch.setattr(Engine, "_build", short)
    with demo(vram="50%") as engine:
        assert tried == [480, 420, 360]
        assert engine.notes == ["the GPU's memory holds no 420 slots: 360 are used"]
        answer(engine, PROMPT)
        assert engine.answer_tokens == expected()[0]
    monkeypatch.setattr(Engine, "_build", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(OffmoeError, match="holds not even 300 expert slots"):
        demo(vram="50%")
