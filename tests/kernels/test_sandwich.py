"""Gemma's norms around the parts of a layer, one token in a launch, against their naive forms."""

from __future__ import annotations

import pytest
import torch
from kernel_tensors import DEVICE, nan, randn
from tolerance import assert_close

pytest.importorskip("triton")
from offmoe.kernels import sandwich as naive
from offmoe.kernels.gpu import sandwich
from offmoe.kernels.norm_rope import rms_norm

EPS = 1e-3


def norms(h: int) -> naive.Sandwich:
    return naive.Sandwich(*(randn(h, seed=seed) for seed in range(5)), torch.full((1,), 0.7, device=DEVICE))


@pytest.mark.parametrize("h", [64, 100, 2816])
def test_what_attention_gives_is_normed_and_added(h: int) -> None:
    x, given, s = randn(h, seed=7), randn(h, seed=8) * 3, norms(h)
    want = x + rms_norm(given, s.attention, EPS)
    sums = given, nan(h), nan(h)  # products add to them next
    taken = nan(h)
    sandwich.attended(x, given, s, EPS, taken, *sums[1:])
    assert_close("x", x, want, 1e-6)
    assert_close("shared_in", taken, rms_norm(want, s.shared_expert_in, EPS), 1e-6)
    assert not any(bool(tensor.any()) for tensor in sums)


@pytest.mark.parametrize("h", [64, 100, 2816])
def test_what_both_parts_give_is_normed_added_and_scaled(h: int) -> None:
    x, shared, routed, s = randn(h, seed=7), randn(h, seed=8) * 3, randn(h, seed=9) / 5, norms(h)
    want = naive.fed(x[None], shared[None], routed[None], s, EPS)[0]
    both = shared / (shared.square().mean() + EPS).sqrt() * s.shared_expert + rms_norm(routed, s.routed, EPS)
    assert_close("naive", want, (x + rms_norm(both, s.both, EPS)) * 0.7, 1e-6)
    sandwich.fed(x, shared, routed, s, EPS)
    assert_close("x", x, want, 1e-6)
