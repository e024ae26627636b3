"""Gated DeltaNet: blocks against token by token against one equation a head, and the step's kernel against both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolerance import assert_close

from offmoe.kernels.deltanet import BLOCK, Delta, DeltaWeights, chunked, delta_mix, recurrent
from offmoe.kernels.shortconv import short_convolution
from offmoe.kernels.striped import unstripe

SHAPES = {
    "grouped": (Delta(2, 4, 16, 16, 4), False), "tiled": (Delta(2, 6, 16, 16, 4), True),
    "uneven": (Delta(3, 3, 12, 24, 2), False),
}  # fmt: skip


def weights_of(name: str, seed: int = 1) -> DeltaWeights:
    delta, tiled = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    heads = delta.value_heads
    return DeltaWeights(delta, normal(delta.taps, delta.channels) * 0.5, -normal(heads).exp(), normal(heads),
                        1 + 0.2 * normal(delta.value_dim), 1e-6, tiled)  # fmt: skip


def states_of(delta: Delta, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn((delta.value_heads, delta.key_dim, delta.value_dim), generator=generator)
    return memory, torch.randn((delta.taps, delta.channels), generator=generator)


def projected(delta: Delta, count: int, seed: int = 3) -> torch.Tensor:
    return torch.randn((count, sum(delta.projected)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_blocks_give_what_token_by_token_gives(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    q, k, v = (torch.randn((count, 3, size), generator=generator) / 4 for size in (16, 16, 24))
    g, beta = -3 * torch.rand((count, 3), generator=generator), torch.rand((count, 3), generator=generator)
    g[count // 2] = -60.0  # all is forgotten; sums of such round
    memory = torch.randn((3, 16, 24), generator=generator)
    one, other = memory.clone(), memory.clone()
    want = recurrent(q, k, v, g, beta, one)
    assert_close("out", chunked(q, k, v, g, beta, other), want, 1e-5)
    assert_close("memory", other, one, 1e-5)


def test_the_delta_rule_is_its_equation() -> None:
    """A key that was put in before is recalled, and corrected by as much as β says."""
    memory, k = torch.zeros((1, 2, 3)), torch.tensor([[[0.6, 0.8]]])
    first, second = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[5.0, 0.0, 1.0]]])
    one, half, none = torch.ones((1, 1)), torch.full((1, 1), 0.5), torch.zeros((1, 1))
    assert_close("put in", recurrent(k, k, first, none, one, memory), first, 1e-6)
    assert_close("half corrected", recurrent(k, k, second, none, half, memory), (first + second) / 2, 1e-6)
    decayed = recurrent(k, k, second, none + torch.tensor(0.5).log(), none, memory)
    assert_close("decayed", decayed, (first + second) / 4, 1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_the_convolution_goes_on_where_it_stood(name: str) -> None:
    w = weights_of(name)
    x = projected(w.shape, 11)[:, : w.shape.channels]
    padded = torch.cat((torch.zeros((w.shape.taps - 1, w.shape.channels)), x))
    want = torch.stack([(padded[t : t + w.shape.taps] * w.conv).sum(0) for t in range(11)])
    recent, parts = torch.zeros((w.shape.taps, w.shape.channels)), []
    for start, stop in ((0, 1), (1, 3), (3, 9), (9, 10), (10, 11)):
        parts.append(short_convolution(x[start:stop], w.conv, recent, start))
    assert_close("convolution", torch.cat(parts), want, 1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_a_chunk_may_be_cut_anywhere(name: str) -> None:
    w = weights_of(name)
    x = projected(w.shape, 80)
    memory, recent = states_of(w.shape)
    one, other = (memory.clone(), recent.clone()), (memory.clone(), recent.clone())
    whole = delta_mix(x, w, *one, 7)
    cut = [delta_mix(x[a:b], w, *other, 7 + a) for a, b in ((0, 5), (5, 6), (6, 72), (72, 80))]
    assert_close("out", torch.cat(cut), whole, 1e-5)
    assert_close("memory", other[0], one[0], 1e-5)
    assert torch.equal(other[1], one[1])


def test_tiled_heads_are_grouped_ones_in_another_order() -> None:
    w = weights_of("tiled")
    d = w.shape
    x, (memory, recent) = projected(d, 9), states_of(d)
    order = torch.arange(d.value_heads).view(d.key_heads, -1).t().flatten()  # tiled head i is the grouped one order[i]
    back = torch.argsort(order)

    def regrouped(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (d.value_heads, -1))[..., back, :].flatten(-2)

    def split(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return t.split((2 * d.keys, d.values), dim=-1)

    grouped = torch.cat([t if i == 0 else regrouped(t) for i, t in enumerate(x.split(
        (2 * d.keys, d.values, d.values, d.value_heads, d.value_heads), dim=-1))], dim=-1)  # fmt: skip
    conv, other = (torch.cat((a, regrouped(b)), dim=-1) for a, b in (split(w.conv), split(recent)))
    there = replace(w, tiled=False, conv=conv, decay=w.decay[back], dt=w.dt[back])
    want = delta_mix(x, w, memory.clone(), recent, 0)
    assert_close("out", delta_mix(grouped, there, memory[back].clone(), other, 0), regrouped(want), 1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_is_one_token_of_a_chunk(name: str) -> None:
    pytest.importorskip("triton")
    from offmoe.kernels.gpu.deltanet import delta_step

    w = weights_of(name)
    x, (memory, recent) = projected(w.shape, 5), states_of(w.shape)
    ours, position = (memory.clone(), recent.clone()), torch.zeros(1, dtype=torch.int32)
    for t in range(5):
        position.fill_(6 + t)
        out = torch.full((w.shape.values,), float("nan"))
        want = delta_mix(x[t : t + 1], w, memory, recent, 6 + t)
        delta_step(x[t], w, *ours, position, torch.zeros(1, dtype=torch.int32), out, ctx=64)
        assert_close(f"token {t}", unstripe(out), want[0], 1e-5)
        assert_close("memory", ours[0], memory, 1e-5)
        assert torch.equal(ours[1], recent)


@pytest.mark.parametrize("count", [1, 3, BLOCK, BLOCK + 21])
@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_on_the_device_is_the_naive_one(name: str, count: int) -> None:
    pytest.importorskip("triton")
    from offmoe.kernels.gpu.deltanet import delta_chunk

    w = weights_of(name)
    x, (memory, recent) = projected(w.shape, count), states_of(w.shape)
    ours = memory.clone(), recent.clone()
    want = delta_mix(x, w, memory, recent, 9)
    assert_close("out", delta_chunk(x, w, *ours, 9), want, 1e-5)
    assert_close("memory", ours[0], memory, 1e-5)
    assert torch.equal(ours[1], recent)


@pytest.mark.parametrize(("position", "status"), [(5, 1), (5, 2), (64, 0), (64, 1)])
def test_a_step_behind_the_end_changes_nothing(position: int, status: int) -> None:
    pytest.importorskip("triton")
    from offmoe.kernels.gpu.deltanet import delta_step

    w = weights_of("grouped")
    states = states_of(w.shape)
    before = [tensor.clone() for tensor in states]
    at, state = (torch.full((1,), value, dtype=torch.int32) for value in (position, status))
    delta_step(projected(w.shape, 1)[0], w, *states, at, state, torch.empty(w.shape.values), ctx=64)
    assert torch.equal(states[0], before[0])
    assert torch.equal(states[1], before[1])
