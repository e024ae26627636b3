"""Greedy tokens of the demo model, as committed: no refactoring may change them."""

from __future__ import annotations

import pytest

import offmoe

GOLDEN = {
    "What is the capital of France?": [497, 3544, 282, 4604, 313, 6938, 30],
    "Write a short poem about rain.": [779, 260, 1893, 282, 260, 5196, 28, 828, 14728, 1225, 28, 198, 49, 8882, 17971,
                                       28, 253, 8882, 5196, 28, 198, 49, 8882, 5196],
    "Explain why the sky is blue in one sentence.": [497, 6297, 313, 4419, 965, 282, 260, 2570, 499, 5210, 28, 520, 313,
                                                     253, 3439, 1171, 282, 260, 2570, 499, 2097, 6378, 282, 1405],
}  # fmt: skip
MARGIN = 0.05  # between the two largest logits: 500 times what float32's rounding moves them by on any processor


@pytest.mark.parametrize("vram", ["50%", "100%"])
def test_greedy_tokens_are_the_golden_ones(vram: str) -> None:
    with offmoe.load("demo", vram=vram, device="cpu", ctx=256) as engine:
        for prompt, tokens in GOLDEN.items():
            engine.reset()
            logits = engine.prefill(engine.prompt_ids(prompt))
            for token in tokens:
                best, second = logits.topk(2).values.tolist()
                assert best - second > MARGIN, f"{prompt!r}: a near tie is no golden token"
                assert int(logits.argmax()) == token, prompt
                logits = engine.step(token)
