"""A recorder keeps the model's routing and does not change its answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import reference, saved

from offmoe.cache.trace import Trace
from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.lab.trace.recorder import Recorder
from offmoe.models.model import open_model
from offmoe.settings import Settings

PROMPTS = ([5, 9, 33, 61, 7, 12, 90], [4, 4, 8])


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """3 layers of 8 experts, top 3; prompts run in chunks of 5, and 11 tokens are decoded: more than BATCH."""
    path = saved("qwen3_moe", tmp_path)
    with Engine(open_model(path), Settings(device="cpu", ctx=64, chunk=5)) as engine:
        yield engine


def answer(engine: Engine, prompt: Any, tokens: int = 12, **sampling: Any) -> list[int]:
    list(engine.generate(prompt, **{"temperature": 0.0, "max_tokens": tokens, **sampling}))
    return engine.answer_tokens


def recorded(engine: Engine, states: bool = False) -> tuple[Trace, list[list[int]]]:
    answers = []
    with Recorder(engine, states) as recorder:
        for number, prompt in enumerate(PROMPTS):
            recorder.label = f"kind {number}"
            engine.reset()
            answers.append(answer(engine, prompt))
    return recorder.trace(), answers


def test_the_trace_is_what_transformers_routes(engine: Engine) -> None:
    trace, answers = recorded(engine)
    assert trace.offsets.tolist() == [0, 11, 22]
    assert trace.prompts.tolist() == [0, 7, 10]
    assert trace.tokens is not None
    assert trace.tokens.tolist() == answers[0][:-1] + answers[1][:-1], "the last token is not run"
    assert trace.prefill_tokens is not None
    assert trace.prefill_tokens.tolist() == PROMPTS[0] + PROMPTS[1]
    assert trace.prefill is not None
    for i, prompt in enumerate(PROMPTS):
        want, *disturbed = reference("qwen3_moe", prompt + answers[i][:-1]).ids()
        assert all(torch.equal(want, other) for other in disturbed), "a near tie in the order of experts"
        rows = slice(*trace.offsets[i : i + 2])
        assert np.array_equal(trace.experts[rows], want[len(prompt) :])
        assert np.array_equal(trace.prefill[slice(*trace.prompts[i : i + 2])], want[: len(prompt)])
    for probs in (trace.probs, trace.prefill_probs):
        assert probs is not None
        assert np.allclose(probs.astype(np.float32).sum(-1), 1, atol=2e-3), "this family renormalises"
        assert (np.diff(probs, axis=-1) <= 0).all(), "in the router's order"
    assert trace.meta["classes"] == ["kind 0", "kind 1"]
    assert (trace.meta["layers"], trace.meta["experts"], trace.meta["top_k"]) == (3, 8, 3)


def test_the_answers_are_those_without_a_recorder(engine: Engine) -> None:
    _, answers = recorded(engine, states=True)
    for prompt, want in zip(PROMPTS, answers, strict=True):
        engine.reset()
        assert answer(engine, prompt) == want


def test_states_give_the_routing(engine: Engine) -> None:
    trace, _ = recorded(engine, states=True)
    assert trace.states is not None
    assert trace.gates is not None
    assert trace.logits is not None
    assert trace.states.shape == (22, 3, 64)
    assert np.allclose((trace.states.astype(np.float32) ** 2).mean(-1), 1, atol=2e-3)
    chosen = np.argsort(-trace.logits.astype(np.float32), axis=-1)[..., :3]
    assert (chosen == trace.experts).mean() > 0.95, "but for ties of float16"
    softmax = np.exp(trace.logits.astype(np.float32))
    softmax = np.take_along_axis(softmax, trace.experts.astype(np.int64), -1)
    assert trace.probs is not None
    assert np.allclose(trace.probs.astype(np.float32), softmax / softmax.sum(-1, keepdims=True), atol=5e-3)
    assert Recorder(engine).with_states is False
    assert recorded(engine)[0].states is None


def test_a_reused_prompt_is_not_run_and_not_kept(engine: Engine) -> None:
    with Recorder(engine) as recorder:
        answer(engine, PROMPTS[0])
        turn = [*PROMPTS[0], *engine.answer_tokens, 33]
        answer(engine, turn)
    trace = recorder.trace()
    assert trace.prefill_tokens is not None
    # the answer's last token was never run; the second turn runs it and what follows
    assert trace.prefill_tokens.tolist() == PROMPTS[0] + turn[len(PROMPTS[0]) + 11 :]


def test_answers_without_a_decoded_token_are_left_out(engine: Engine) -> None:
    with Recorder(engine) as recorder:
        answer(engine, PROMPTS[0], tokens=1)
        with pytest.raises(OffmoeError, match="nothing was decoded"):
            recorder.trace()
        engine.reset()
        answer(engine, PROMPTS[1], tokens=3)
        assert recorder.tokens == 2
    trace = recorder.trace()
    assert trace.prefill_tokens is not None
    assert trace.prefill_tokens.tolist() == PROMPTS[1]


def test_the_same_prompt_again_is_another_sequence(engine: Engine) -> None:
    with Recorder(engine) as recorder:
        for _ in range(2):
            engine.reset()
            answer(engine, PROMPTS[1], tokens=3)
    assert recorder.trace().prompts.tolist() == [0, 3, 6]
    assert recorder.trace().offsets.tolist() == [0, 2, 4]


def test_a_pass_that_fails_leaves_whole_rows_only(engine: Engine) -> None:
    """After an error between the layers of a token, its events are dropped."""
    apply, calls = engine.store.apply, 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 * 2 + 3 * 2 + 2:  # two chunks of the prompt, two tokens, then the second layer
            raise OffmoeError("the disk is gone")
        return apply(*arguments)

    engine.store.apply = failing  # type: ignore[method-assign]
    with Recorder(engine) as recorder:
        with pytest.raises(OffmoeError, match="disk"):
            answer(engine, PROMPTS[0])
        engine.store.apply = apply  # type: ignore[method-assign]
        engine.reset()
        answer(engine, PROMPTS[1], tokens=2)
    assert recorder.trace().offsets.tolist() == [0, 2, 3]


def test_a_decoder_that_knows_no_weights_gives_ids_alone(engine: Engine) -> None:
    """Like a CUDA graph, which reports its ids afterwards."""
    want, _ = recorded(engine)
    with Recorder(engine) as recorder:
        told = engine.store.routed
        assert told is not None
        engine.store.routed = lambda layer, ids, weights: told(
            layer, ids.astype(np.int32), weights if engine.store.prompt else torch.empty(0)
        )
        for prompt in PROMPTS:
            engine.reset()
            answer(engine, prompt)
    assert recorder.trace(classes=want.meta["classes"]) == replace(want, probs=None)


def test_one_recorder_at_a_time(engine: Engine) -> None:
    with Recorder(engine), pytest.raises(OffmoeError, match="already being recorded"), Recorder(engine):
        pass
    with Recorder(engine):
        pass
    assert engine.store.routed is None
    assert engine.forward.watch is None


def test_a_trace_of_the_demo_can_be_read_without_it() -> None:
    with Engine.load(str(DEMO), device="cpu", ctx=256) as engine, Recorder(engine) as recorder:
        answer(engine, "What is the capital of France?", tokens=4)
    trace = recorder.trace(phase="test")
    assert trace.tokens is not None
    assert "".join(trace.meta["pieces"][str(token)] for token in trace.tokens) == "The capital of"
    assert trace.meta["phase"] == "test"
    assert trace.experts.dtype == np.uint8
