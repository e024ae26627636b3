"""Gated short convolutions against one equation a token, and the kernels against the naive one."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from offmoe.kernels.shortconv import ConvWeights, ShortConv, conv_mix
from offmoe.kernels.striped import unstripe

SHAPES = {"lfm2": ShortConv(256, 3), "two": ShortConv(64, 2), "ragged": ShortConv(144, 5)}
NOTHING = torch.zeros(0)


def made(name: str, tokens: int) -> tuple[ConvWeights, torch.Tensor, torch.Tensor]:
    """Weights, projected [tokens, 3 C], recent [taps, C]."""
    shape, generator = SHAPES[name], torch.Generator().manual_seed(tokens)
    sizes = ((shape.taps, shape.channels), (tokens, 3 * shape.channels), (shape.taps, shape.channels))
    conv, projected, recent = (torch.randn(size, generator=generator) for size in sizes)
    return ConvWeights(shape, conv), projected, recent


@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_cut_anywhere_is_its_equation(name: str) -> None:
    w, projected, recent = made(name, 11)
    before, behind, x = projected.chunk(3, dim=-1)
    taps, past = w.shape.taps, [recent[p % w.shape.taps] for p in range(7 - w.shape.taps + 1, 7)]
    inputs = torch.stack([*past, *(before * x)])
    want = torch.stack([behind[t] * sum(inputs[t + i] * w.conv[i] for i in range(taps)) for t in range(11)])
    cuts = ((0, 1), (1, 3), (3, 9), (9, 10), (10, 11))
    parts = [conv_mix(projected[a:b], w, NOTHING, recent, 7 + a) for a, b in cuts]
    assert_close("out", torch.cat(parts), want, 1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_is_one_token_of_a_prompt(name: str) -> None:
    pytest.importorskip("triton")
    from offmoe.kernels.gpu.shortconv import conv_step

    w, projected, recent = made(name, 7)
    ours, position, status = recent.clone(), *(torch.zeros(1, dtype=torch.int32) for _ in range(2))
    for t in range(7):
        position.fill_(6 + t)
        out = torch.full((w.shape.values,), float("nan"))
        conv_step(projected[t], w, ours, position, status, out, ctx=64)
        want = conv_mix(projected[t : t + 1], w, NOTHING, recent, 6 + t)
        assert_close(f"token {t}", unstripe(out), want[0], 1e-6)
        assert torch.equal(ours, recent)


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_on_the_device_is_the_naive_one(name: str, count: int) -> None:
    pytest.importorskip("triton")
    from offmoe.kernels.gpu.shortconv import conv_chunk

    w, projected, recent = made(name, count)
    ours = recent.clone()
    want = conv_mix(projected, w, NOTHING, recent, 9)
    assert_close("out", conv_chunk(projected, w, ours, 9), want, 1e-6)
    assert torch.equal(ours, recent)


@pytest.mark.parametrize(("position", "status"), [(5, 1), (5, 2), (64, 0)])
def test_a_step_behind_the_end_changes_nothing(position: int, status: int) -> None:
    pytest.importorskip("triton")
    from offmoe.kernels.gpu.shortconv import conv_step

    w, projected, recent = made("lfm2", 1)
    before = recent.clone()
    at, state = (torch.full((1,), value, dtype=torch.int32) for value in (position, status))
    conv_step(projected[0], w, recent, at, state, torch.empty(w.shape.values), ctx=64)
    assert torch.equal(recent, before)
