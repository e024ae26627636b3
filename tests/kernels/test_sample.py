"""The sampling reference: hand-computed probabilities, exact supports, seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels.sample import kept, likeliest, penalised, sample

LOGITS = torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05]).log()


def draw(logits: Tensor, generator: torch.Generator, **settings: Any) -> int:
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "history": []}
    return int(sample(logits, generator=generator, **(off | settings)))


def support(logits: Tensor, **settings: Any) -> set[int]:
    generator = torch.Generator().manual_seed(1)
    return {draw(logits, generator, **settings) for _ in range(400)}


def greedy(logits: Tensor, **settings: Any) -> int:
    return draw(logits, torch.Generator(), temperature=0.0, **settings)


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([0.0, 3.0, -1.0, 3.0, 3.0])
    assert greedy(logits) == 1


def test_everything_can_come_when_all_is_off() -> None:
    assert support(LOGITS) == {0, 1, 2, 3, 4}


def test_minus_infinity_never_comes() -> None:
    logits = LOGITS.clone()
    logits[1] = -torch.inf
    assert support(logits) == {0, 2, 3, 4}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.0}, {0}),
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.8}, {0, 1, 3}),
        ({"min_p": 0.35}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.7}, {0, 1}),  # of the three, the first has 0.59, the two have 0.82
        ({"temperature": 0.25, "min_p": 0.02}, {0, 1}),  # p^4: 1, .026, .0016, .0081, .0001 of the largest
    ],
)
def test_support(settings: dict[str, Any], expected: set[int]) -> None:
    assert support(LOGITS, **settings) == expected


def test_frequencies_are_the_probabilities() -> None:
    """10,000 draws at a fixed seed: five sigmas are 0.025 at most."""
    generator = torch.Generator().manual_seed(5)
    draws = [draw(LOGITS, generator) for _ in range(10_000)]
    seen = torch.bincount(torch.tensor(draws), minlength=5) / 10_000
    assert (seen - LOGITS.exp()).abs().max() < 0.025


def test_kept_by_hand() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert kept(probabilities, 0.8, 0.0).tolist() == pytest.approx([0.5, 0.3, 0, 0])
    assert kept(probabilities, 0.0, 0.0).tolist() == pytest.approx([0.5, 0, 0, 0])
    assert kept(probabilities, 1.0, 0.2).tolist() == pytest.approx([0.5, 0.3, 0.15, 0])


def test_penalty_by_hand() -> None:
    """A repeated id is weakened once, however often it stands in the history."""
    history = torch.tensor([0, 1, 1, 0])
    scores = torch.tensor([2.0, -2.0, 3.0])
    assert penalised(scores, history, 2.0).tolist() == [1.0, -4.0, 3.0]
    assert penalised(scores, [], 2.0).tolist() == [2.0, -2.0, 3.0]
    assert scores.tolist() == [2.0, -2.0, 3.0]  # the caller's logits are untouched
    assert greedy(torch.tensor([2.0, 1.5]), history=[0], repeat_penalty=2.0) == 1


def test_likeliest_is_sorted_and_stable() -> None:
    scores, ids = likeliest(torch.tensor([1.0, 4.0, 1.0, 4.0]), 0)
    assert (scores.tolist(), ids.tolist()) == ([4.0, 4.0, 1.0, 1.0], [1, 3, 0, 2])


def test_one_seed_gives_one_answer() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(2))

    def answer(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(logits, generator) for _ in range(20)]

    assert answer(3) == answer(3)
    assert answer(3) != answer(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    assert support(LOGITS.to(dtype), top_k=2) == {0, 1}


def test_same_warping_as_transformers() -> None:
    """Which tokens may come, on random logits, against transformers' own processors in the same order."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 3 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    history = torch.tensor([3, 7, 7, 20])
    steps = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.8),
        TopKLogitsWarper(30),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.03),
    ]
    expected = LogitsProcessorList(steps)(history[None], logits.double()[None])[0].softmax(0)
    scores, ids = likeliest(penalised(logits, history, 1.3) / 0.8, 30)
    weights = kept(scores.softmax(0), 0.9, 0.03)
    got = torch.zeros(60).index_put((ids,), weights / weights.sum())
    assert 1 < int((got > 0).sum()) < 30
    assert_close("probabilities", got, expected, 1e-6)
