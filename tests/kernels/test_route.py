"""Routing rules, against each written out for one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from offmoe.experts.store import grouped
from offmoe.kernels.route import Rule, select

RULES = [
    Rule(top_k=3), Rule(top_k=3, renormalise=True), Rule(biased=True, top_k=2), Rule(groups=4, kept=2, top_k=4),
    Rule("sigmoid", top_k=1), Rule("sigmoid", biased=True, groups=3, kept=1, group_best=2, top_k=4),
    Rule("sigmoid", biased=True, groups=6, kept=4, group_best=2, top_k=5, renormalise=True, scale=2.5),
    Rule("none", top_k=2), Rule("none", biased=True, groups=4, kept=3, top_k=2, scale=0.5),
    Rule(top_k=5, top_p=0.6), Rule("sigmoid", biased=True, top_k=4, top_p=0.95, renormalise=True, scale=2.0),
    Rule("mixer", top_k=2, jitter=0.2), Rule("mixer", top_k=3, jitter=0.4),
]  # fmt: skip


def mixed(logits: list[float], rule: Rule) -> dict[int, float]:
    """Each choice is the largest of what is left, and shares with all of it that is near enough."""
    chosen: dict[int, float] = {}
    for _ in range(rule.top_k):
        rest = [e for e in range(len(logits)) if e not in chosen]
        best = max(rest, key=logits.__getitem__)
        near = [e for e in rest if logits[best] - logits[e] <= 2 * rule.jitter * max(abs(logits[e]), logits[best])]
        assert len(near) > 1 or rule.jitter < 0.3
        chosen[best] = math.exp(logits[best]) / sum(math.exp(logits[e]) for e in near)
    return chosen


def written_out(logits: list[float], rule: Rule, bias: list[float]) -> dict[int, float]:
    """Expert → weight."""
    if rule.scores == "mixer":
        return mixed(logits, rule)
    if rule.scores == "softmax":
        total = sum(map(math.exp, logits))
        scores = [math.exp(value) / total for value in logits]
    else:
        scores = [1 / (1 + math.exp(-value)) if rule.scores == "sigmoid" else value for value in logits]
    order = [score + (bias[e] if rule.biased else 0) for e, score in enumerate(scores)]
    each = len(logits) // rule.groups
    worth = [sum(sorted(order[g * each : (g + 1) * each])[-rule.group_best :]) for g in range(rule.groups)]
    kept = sorted(range(rule.groups), key=worth.__getitem__)[-rule.kept :]
    allowed = [e for e in range(len(logits)) if e // each in kept]
    chosen = sorted(allowed, key=order.__getitem__)[: -rule.top_k - 1 : -1]
    if rule.top_p < 1:
        chosen = chosen[: next((n for n in range(1, len(chosen)) if sum(scores[e] for e in chosen[:n]) >= rule.top_p),
                               len(chosen))]  # fmt: skip
    total = sum(scores[e] for e in chosen) if rule.renormalise else 1
    return {e: scores[e] / total * rule.scale for e in chosen}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_is_what_it_says(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, bias = torch.randn((9, 24 if rule.groups != 3 else 12), generator=generator) * 2, None
    bias = torch.randn(logits.shape[1], generator=generator) * 0.3
    ids, weights = select(logits, rule, bias if rule.biased else None)
    assert ids.shape == weights.shape == (9, rule.top_k)
    assert weights.dtype == torch.float32
    counts = set()
    for row, experts, got in zip(logits.tolist(), ids.tolist(), weights.tolist(), strict=True):
        want = written_out(row, rule, bias.tolist())
        assert set(experts[len(want) :]) <= {-1}
        assert set(got[len(want) :]) <= {0.0}
        counts.add(len(want))
        assert dict(zip(experts[: len(want)], got, strict=False)) == pytest.approx(want, rel=1e-5)
    assert (len(counts) > 1) == (rule.top_p < 1)


def test_a_softmax_keeps_its_bits() -> None:
    """What was routed before there were rules is routed so still."""
    logits = torch.randn((50, 64), generator=torch.Generator().manual_seed(2)) * 3
    weights, ids = logits.softmax(-1).topk(8)
    for renormalise, want in ((False, weights), (True, weights / weights.sum(-1, keepdim=True))):
        got = select(logits, Rule(top_k=8, renormalise=renormalise))
        assert torch.equal(got[0], ids)
        assert torch.equal(got[1], want)


def test_empty_places_are_of_no_expert() -> None:
    experts, uses, places = grouped(np.array([-1, 3, 1, -1, 3]))
    assert (experts.tolist(), uses.tolist()) == ([1, 3], [1, 2])
    assert [where.tolist() for where in places] == [[2], [1, 4]]
