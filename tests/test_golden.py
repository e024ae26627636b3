"""Greedy tokens of the demo model stay the committed ones, whatever is rewritten."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine

# Each token's logit is at least MARGIN above the next: a thousand times what processors and orders of sums differ by.
MARGIN = 0.1
GOLDEN = {
    "What is the capital of France?": [497, 3544, 282, 4604, 313, 6938, 30],
    "Hello! How are you today?": [15020, 17, 1061, 356, 344, 1816, 47],
    "Name three colors.": [497, 1283, 4638, 282, 260, 16677, 356, 42, 4419, 28, 2361, 28, 284, 2633, 30],
}


@pytest.fixture(scope="module", params=["50%", "100%"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load(str(DEMO), device="cpu", ctx=128, vram=request.param) as engine:
        yield engine


@pytest.mark.fast
@pytest.mark.parametrize("prompt", GOLDEN)
def test_the_demo_says_what_it_said(engine: Engine, prompt: str) -> None:
    engine.reset()
    list(engine.generate(prompt, temperature=0.0, max_tokens=24))
    assert engine.answer_tokens == GOLDEN[prompt]


@pytest.mark.parametrize("prompt", GOLDEN)
def test_no_token_was_a_close_call(engine: Engine, prompt: str) -> None:
    engine.reset()
    row = engine.prefill(engine.prompt_ids(prompt))
    for token in GOLDEN[prompt]:
        (first, second), (best, _) = row.topk(2)
        assert best == token
        assert first - second > MARGIN
        row = engine.step(token)
