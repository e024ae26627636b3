"""Gated short convolutions on a real GPU: a step in a captured graph, and a prompt, against the naive ones."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from offmoe.kernels.gpu.gemv import dense
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.gpu.shortconv import conv_chunk, conv_step
from offmoe.kernels.planes import matrix, rearrange_matrix
from offmoe.kernels.shortconv import ConvWeights, ShortConv, conv_mix
from offmoe.kernels.striped import stripe, unstripe

SHAPE = ShortConv(2048, 3)  # LFM2-8B-A1B's


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("pdl", [False, True])
def test_a_step_in_a_graph_is_the_naive_one(pdl: bool) -> None:
    """Behind the product that it waits for; the inputs go on from launch to launch."""
    if pdl and not pdl_supported(torch.device("cuda", 0)):
        pytest.skip("no programmatic dependent launch here")
    hidden, weight = 256, randn(3 * SHAPE.channels, 256, seed=2) / 16
    w, nothing = ConvWeights(SHAPE, randn(SHAPE.taps, SHAPE.channels)), torch.zeros(0, device="cuda")
    form = matrix("F32", len(weight), hidden)
    part = rearrange_matrix(weight.cpu().view(torch.uint8).flatten(), form).cuda(), form
    recent = randn(SHAPE.taps, SHAPE.channels, seed=4)
    ours, x, out = recent.clone(), randn(1, hidden), randn(SHAPE.values)
    projected = torch.empty((1, len(weight)), device="cuda")
    position, status = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))

    def launch() -> None:
        dense(x, (part,), projected)
        conv_step(projected[0], w, ours, position, status, out, ctx=64, pdl=pdl)

    status.fill_(1)
    launch()
    assert torch.equal(ours, recent), "a step behind the end left its mark"
    status.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for t in range(6):
        fresh = randn(1, hidden, seed=10 + t)
        x.copy_(stripe(fresh))
        position.fill_(5 + t)
        graph.replay()
        want = conv_mix(fresh @ weight.t(), w, nothing, recent, 5 + t)
        assert_close(f"token {t}", unstripe(out), want[0], 1e-4)
        assert_close("recent", ours, recent, 1e-5)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_prompt_is_the_naive_one(dtype: torch.dtype, ratio: float) -> None:
    w, recent = ConvWeights(SHAPE, randn(SHAPE.taps, SHAPE.channels)), randn(SHAPE.taps, SHAPE.channels, seed=4)
    x, ours = randn(300, 3 * SHAPE.channels, seed=5).to(dtype), recent.clone()
    want = conv_mix(x, w, torch.zeros(0, device="cuda"), recent, 9)
    assert_close("out", conv_chunk(x, w, ours, 9).float(), want, ratio)
    assert torch.equal(ours, recent)
