"""The device's sampler on a real GPU: real vocabularies, graphs whose parameters change, frequencies, the ring."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from offmoe.kernels.gpu import sample as fast
from offmoe.kernels.gpu.advance import advance
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.ring import COUNTED, RUN, Ring, row_words
from offmoe.kernels.sample import sample, uniforms

CUDA = torch.device("cuda")
OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "repeat_penalty": 1.2},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 64, "min_p": 0.01, "repeat_penalty": 1.1},
    {"top_p": 0.95},
    {"top_k": 500, "top_p": 0.9, "temperature": 1.5},
    {"min_p": 0.02, "repeat_penalty": 0.9},
    {},
]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=CUDA)


class Sampler:
    """Static buffers, and a graph for each variant."""

    def __init__(self, logits: Tensor) -> None:
        vocab = len(logits)
        self.logits = logits.to(CUDA)
        self.params = torch.zeros(5, device=CUDA)
        self.seed, self.step = torch.zeros(1, dtype=torch.int64, device=CUDA), int32(0)
        self.seen = torch.zeros(vocab, dtype=torch.uint8, device=CUDA)
        self.status, self.out = int32(RUN), int32(-7)
        self.scratch = fast.Scratch.of(vocab, CUDA)
        self.graphs = {which: self.captured(which) for which in ("greedy", "topk", "full")}

    def launch(self, which: str) -> None:
        pdl = pdl_supported(torch.device("cuda", torch.cuda.current_device()))
        fast.sample_step(self.logits, self.params, self.seed, self.step, self.seen, self.status, self.out,
                         self.scratch, variant=which, pdl=pdl)  # fmt: skip

    def captured(self, which: str) -> torch.cuda.CUDAGraph:
        self.params.copy_(fast.params_of(1.0, 40, 0.9, 0.0, 1.0, CUDA))
        self.launch(which)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.launch(which)
        return graph

    def draw(self, step: int, **settings: Any) -> int:
        values = OFF | settings
        self.params.copy_(fast.params_of(**values, device=CUDA))
        self.step.fill_(step)
        self.out.fill_(-7)
        self.graphs[fast.variant(values["temperature"], values["top_k"])].replay()
        return int(self.out)


@pytest.mark.parametrize("vocab", [5, 50304, 151936, 262144])
def test_the_same_uniforms_give_the_same_id(vocab: int) -> None:
    """All parameters change between replays of the same graphs. Ranks at the edge of top-p may differ by rounding."""
    torch.manual_seed(vocab)
    sampler = Sampler(2.5 * torch.randn(vocab))
    wrong = []
    for seed, settings in enumerate(SETTINGS):
        sampler.seed.fill_((seed << 40) + 3)
        sampler.seen.zero_()
        sampler.seen[torch.randint(vocab, (50,), device=CUDA)] = 1
        for step in range(10):
            numbers = uniforms((seed << 40) + 3, step, torch.arange(vocab, device=CUDA))
            history = sampler.seen.nonzero().flatten()
            want = int(sample(sampler.logits, history=history, uniforms=numbers, **(OFF | settings)))
            got = sampler.draw(step, **settings)
            if got != want:
                wrong.append((settings, step, got, want))
            assert 0 <= got < vocab
            assert sampler.seen[got] == 1
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("settings", [{"top_k": 40}, {}])
def test_frequencies_are_the_probabilities(settings: dict[str, Any]) -> None:
    """Chi-square of 4,000 draws over 5 ids: 4 degrees of freedom, p = 0.001."""
    logits = torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05]).log()
    sampler = Sampler(logits)
    drawn = torch.tensor([sampler.draw(step, **settings) for step in range(4000)])
    expected = logits.exp() * 4000
    assert ((torch.bincount(drawn, minlength=5) - expected).square() / expected).sum() < 18.5


def test_one_seed_gives_one_answer() -> None:
    sampler = Sampler(torch.randn(50304))

    def answer(seed: int, **settings: Any) -> list[int]:
        sampler.seed.fill_(seed)
        sampler.seen.zero_()
        return [sampler.draw(step, **settings) for step in range(50)]

    for settings in SETTINGS[1:4]:
        assert answer(3, **settings) == answer(3, **settings)
        assert answer(3, **settings) != answer(4, **settings)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 3}, {}])
def test_nan_is_no_token(settings: dict[str, Any]) -> None:
    sampler = Sampler(torch.randn(151936))
    sampler.seen.zero_()
    for at in (0, 77777, 151935):
        kept = sampler.logits[at].clone()
        sampler.logits[at] = torch.nan
        assert sampler.draw(0, **settings) == -1
        assert not sampler.seen.any()
        sampler.logits[at] = kept
    assert sampler.draw(0, **settings) >= 0


def test_the_ring_is_read_behind_a_running_gpu() -> None:
    """A graph of sampler and end, launched 300 times without a wait; rows come in order and whole."""
    sampler = Sampler(torch.randn(50304))
    ids = torch.arange(384, dtype=torch.int32, device=CUDA).view(48, 8)
    counters = torch.zeros(COUNTED, dtype=torch.int32, device=CUDA)
    state = {"token": int32(0), "position": int32(0), "clock": int32(0), "remaining": int32(250)}
    ring = Ring(torch.zeros((512, row_words(384)), dtype=torch.int32).pin_memory(), 48, 8)
    sampler.step.zero_()
    sampler.params.copy_(fast.params_of(1.0, 40, 1.0, 0.0, 1.0, CUDA))
    pdl = pdl_supported(torch.device("cuda", torch.cuda.current_device()))

    def launch() -> None:
        sampler.launch("topk")
        advance(sampler.out, **state, steps=sampler.step, status=sampler.status, eos=int_eos, counters=counters,
                ids=ids, ring=ring.address, rows=512, pdl=pdl)  # fmt: skip

    int_eos = int32(50303)
    sampler.logits[50303] = -torch.inf
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    ring.clear()
    for tensor, value in ((sampler.step, 0), (sampler.status, RUN), (state["remaining"], 250), (state["position"], 0)):
        tensor.fill_(value)
    torch.cuda.synchronize()
    for _ in range(300):
        graph.replay()
    rows, deadline = [], time.monotonic() + 20
    for step in range(250):
        while (row := ring.poll(step)) is None:
            assert time.monotonic() < deadline, f"step {step} never came"
        rows.append(row)
        assert row.ids.ravel().tolist() == list(range(384))
    torch.cuda.synchronize()
    assert [row.done for row in rows] == [False] * 249 + [True]
    assert ring.poll(250) is None
    assert int(state["position"]) == 250
    stamps = [row.stamp for row in rows]
    assert stamps == sorted(stamps)
    assert stamps[0] > 0
    assert rows[-1].token == int(state["token"])
