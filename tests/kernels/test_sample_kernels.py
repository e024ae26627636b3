"""The device's sampler through Triton's interpreter (or on the GPU that is there), against the naive one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
import torch
from exhaustive import cases
from torch import Tensor

from offmoe.kernels.sample import sample, uniforms

pytest.importorskip("triton")
import triton
import triton.language as tl

from offmoe.kernels.gpu import sample as fast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
BLOCK = 128


class Sampler:
    """A vocabulary's buffers; `draw` answers as the graph would."""

    def __init__(self, logits: Tensor, history: Sequence[int] = (), seed: int = 0, **settings: float) -> None:
        self.logits, self.settings = logits.to(DEVICE), OFF | settings
        self.params = fast.params_of(**self.settings, device=DEVICE)
        self.seed = torch.tensor([seed], device=DEVICE)
        self.seen = torch.zeros(len(logits), dtype=torch.uint8, device=DEVICE)
        self.seen[list(history)] = 1
        self.status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.scratch = fast.Scratch.of(64 * len(logits), DEVICE)
        self.scratch = fast.Scratch(self.scratch.best, self.scratch.ticket, *(
            t[: len(logits)] for t in (self.scratch.scores, self.scratch.noise, self.scratch.ranks)
        ))  # fmt: skip

    def draw(self, step: int = 0, variant: str | None = None) -> int:
        out = torch.full((1,), -7, dtype=torch.int32, device=DEVICE)
        which = variant or fast.variant(self.settings["temperature"], self.settings["top_k"])
        at = torch.tensor([step], dtype=torch.int32, device=DEVICE)
        fast.sample_step(self.logits, self.params, self.seed, at, self.seen, self.status, out, self.scratch,
                         variant=which, block=BLOCK)  # fmt: skip
        assert not self.scratch.ticket.any()
        return int(out)

    def expected(self, step: int = 0) -> int:
        numbers = uniforms(int(self.seed), step, torch.arange(len(self.logits)))
        history = self.seen.cpu().nonzero().flatten()
        return int(sample(self.logits.cpu(), history=history, uniforms=numbers, **self.settings))


def randn(vocab: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repeat_penalty": 1.7},
    {"top_k": 1},
    {"top_k": 64},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 40, "min_p": 0.05, "repeat_penalty": 1.3},
    {"top_k": 10, "top_p": 0.0},
    {},
    {"top_p": 0.9},
    {"top_k": 100, "top_p": 0.95, "min_p": 0.001, "temperature": 1.5},
    {"min_p": 0.02, "repeat_penalty": 0.8},
]


@pytest.mark.parametrize(
    ("settings", "vocab"), cases(product(SETTINGS, (5, 300)), list(zip(SETTINGS, cycle((300, 5)), strict=False)))
)
def test_the_same_uniforms_give_the_same_id(settings: dict[str, Any], vocab: int) -> None:
    sampler = Sampler(randn(vocab), history=[0, 3, 4], seed=1234567890123456789, **settings)
    for step in range(3):
        want = sampler.expected(step)
        assert sampler.draw(step) == want
        assert sampler.seen[want] == 1


def test_topk_and_full_agree() -> None:
    for step in range(4):
        sampler = Sampler(randn(300, seed=step), top_k=30, top_p=0.9)
        assert sampler.draw(step, fast.TOPK) == sampler.draw(step, fast.FULL)


@pytest.mark.parametrize("variant", [fast.GREEDY, fast.TOPK, fast.FULL])
def test_cold_takes_the_first_of_equals(variant: str) -> None:
    logits = torch.full((300,), -1.0)
    logits[[140, 141, 290]] = 3.0
    assert Sampler(logits, temperature=0.0, top_k=5).draw(variant=variant) == 140
    assert Sampler(torch.tensor([-0.0, 0.0, -1.0]), temperature=0.0, top_k=2).draw(variant=variant) == 0


@pytest.mark.parametrize("variant", [fast.GREEDY, fast.TOPK, fast.FULL])
@pytest.mark.parametrize("where", [0, 131, 299])
def test_nan_is_no_token(variant: str, where: int) -> None:
    logits = randn(300)
    logits[where] = -torch.nan if where else torch.nan
    sampler = Sampler(logits, temperature=0.0 if variant == fast.GREEDY else 1.0, top_k=7)
    assert sampler.draw(variant=variant) == -1
    assert not sampler.seen.any()


@pytest.mark.parametrize("variant", [fast.GREEDY, fast.TOPK, fast.FULL])
def test_infinite_logits(variant: str) -> None:
    logits = torch.full((200,), -torch.inf)
    logits[150] = 2.0
    assert Sampler(logits, temperature=0.0 if variant == fast.GREEDY else 1.0, top_k=9).draw(variant=variant) == 150


@pytest.mark.parametrize("variant", [fast.TOPK, fast.FULL])
def test_past_the_end_nothing_is_seen(variant: str) -> None:
    sampler = Sampler(randn(300), top_k=4)
    sampler.status.fill_(1)
    assert sampler.draw(variant=variant) >= 0
    assert not sampler.seen.any()


def test_one_seed_gives_one_answer() -> None:
    def answer(seed: int) -> list[int]:
        return [Sampler(randn(100) / 3, top_k=50, seed=seed).draw(step) for step in range(3)]

    assert answer(3) == answer(3)
    assert answer(3) != answer(4)
    assert answer(3) != answer(3 + (1 << 32))  # all 64 bits count


def test_frequencies_are_the_probabilities() -> None:
    """Chi-square of 20,000 draws over 5 ids, through the twin, whose ids are those of the kernel."""
    logits = torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05]).log()
    draws = 20_000
    numbers = uniforms(7, torch.arange(draws).unsqueeze(1), torch.arange(5))
    seen = torch.bincount((logits.exp() / -numbers.log()).argmax(1), minlength=5)
    expected = logits.exp() * draws
    assert ((seen - expected).square() / expected).sum() < 18.5  # 4 degrees of freedom, p = 0.001


def test_uniforms_are_philox() -> None:
    """Known answers of the Random123 distribution: counter and key all 0, counter and key all 1."""
    assert uniforms(0, 0, torch.tensor([0])) == ((0x6627E8D5 >> 9) + 0.5) * 2.0**-23


def test_uniforms_are_those_of_the_kernel() -> None:
    @triton.jit
    def numbers(out, seed, step):
        i = tl.arange(0, 64)
        tl.store(out + i, fast.uniform(tl.load(seed), tl.load(step), i * 4001))

    seed, step = 0xFEDCBA9876543210 - (1 << 64), 77
    out = torch.zeros(64, device=DEVICE)
    numbers[(1,)](out, torch.tensor([seed], device=DEVICE), torch.tensor([step], dtype=torch.int32, device=DEVICE))
    want = uniforms(seed, step, 4001 * torch.arange(64))
    assert np.array_equal(out.cpu().numpy(), want.numpy())
    assert 0 < want.min() < want.max() < 1


def test_variants() -> None:
    assert [fast.variant(0.0, 0), fast.variant(1.0, 64), fast.variant(1.0, 65), fast.variant(1.0, 0)] == [
        "greedy", "topk", "full", "full"
    ]  # fmt: skip
