"""Experts chosen by a router's logits, and their scores, within one program: the twin of kernels.route."""

from __future__ import annotations

import triton
import triton.language as tl

from offmoe.kernels.gpu.resolve import ordered
from offmoe.kernels.route import Rule

SCORES = {"softmax": 0, "mixer": 1, "sigmoid": 2, "none": 3}  # up to MIXER exponentials, which are to be summed
SOFTMAX, MIXER, SIGMOID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TAKEN = tl.constexpr(-(1 << 31))  # key of an expert that is ranked already, or of padding
LAST = tl.constexpr(1 << 30)  # rank of an expert that is not chosen


@triton.jit
def judged(
    logits, bias, experts, EP: tl.constexpr, SCORES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    BEST: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """Return the keys that experts are ranked by [EP] and their scores [EP]; a softmax is not divided yet."""
    e = tl.arange(0, EP)
    value = tl.load(logits + e, mask=e < experts, other=-float("inf"), cache_modifier=".cg")
    if SCORES <= MIXER:
        score = tl.exp(value - tl.max(value, 0))
        order = value
        if (bias is not None) or (GROUPS > KEPT):
            order = score / tl.sum(score, 0)
    elif SCORES == SIGMOID:
        score = tl.sigmoid(value)
        order = score
    else:
        score = tl.where(e < experts, value, 0.0)
        order = value
    if bias is not None:
        order += tl.load(bias + e, mask=e < experts, other=0.0)
    if GROUPS > KEPT:
        order = in_groups(order, experts, EP, GROUPS, KEPT, BEST, GP)
    return order, score


@triton.jit
def in_groups(
    order, experts, EP: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """Return `order` [EP] with -inf in the expert groups that are not kept."""
    e = tl.arange(0, EP)
    member = (e // (experts // GROUPS))[None, :] == tl.arange(0, GP)[:, None]
    inside = tl.where(member & (e < experts)[None, :], order[None, :], -float("inf"))
    worth = tl.zeros((GP,), tl.float32)
    for _ in tl.static_range(BEST):
        best, at = tl.max(inside, 1, return_indices=True)
        worth += best
        inside = tl.where(e[None, :] == at[:, None], -float("inf"), inside)
    kept = member & (ranked(worth, GROUPS, KEPT, GP) < KEPT)[:, None]
    return tl.where(tl.sum(kept.to(tl.int32), 0) > 0, order, -float("inf"))


@triton.jit
def ranked(value, experts, k: tl.constexpr, EP: tl.constexpr):
    """Return the rank of each value [EP] in descending order, up to k; equals by index, NaN is ranked too.

    k short rounds: comparing all pairs at once is so much code, executed once, that it costs 22 µs for 256 experts.
    """
    e = tl.arange(0, EP)
    key = tl.where(e < experts, tl.maximum(ordered(value), TAKEN + 1), TAKEN)
    rank = tl.full((EP,), LAST, tl.int32)
    for n in range(k):
        first = tl.min(tl.where(key == tl.max(key, 0), e, EP), 0)
        rank = tl.where(e == first, n, rank)
        key = tl.where(e == first, TAKEN, key)
    return rank


@triton.jit
def places(ids, EP: tl.constexpr, KP: tl.constexpr):
    """Return the position of each expert [EP] in `ids` [KP] (-1 padded), LAST where it is absent."""
    found = ids[:, None] == tl.arange(0, EP)[None, :]
    rank = tl.sum(tl.where(found, tl.arange(0, KP)[:, None] + 1, 0), 0)
    return tl.where(rank > 0, rank - 1, LAST)


@triton.jit
def enough(score, rank, top_p, K: tl.constexpr, EP: tl.constexpr, SCORES: tl.constexpr):
    """Return how many of the first K by rank have scores that sum to top_p, including the one that reaches it."""
    if SCORES <= MIXER:
        score = score / tl.sum(score, 0)
    count, mass = 1, tl.sum(tl.where(rank == 0, score, 0.0), 0)
    for j in tl.static_range(1, K):
        count += tl.where(mass < top_p, 1, 0)
        mass += tl.sum(tl.where(rank == j, score, 0.0), 0)
    return count


@triton.jit
def mixed(logit, rank, experts, jitter, K: tl.constexpr, EP: tl.constexpr):
    """Return the weights [EP] of the first K by rank, as kernels.route.mixed computes them."""
    there = tl.arange(0, EP) < experts
    logit = tl.where(there, logit, 1.0)
    weight = tl.zeros((EP,), tl.float32)
    for j in tl.static_range(K):
        top = tl.sum(tl.where(there & (rank == j), logit, 0.0), 0)
        far = (top - logit) / tl.maximum(tl.abs(logit), top) > 2 * jitter
        total = tl.sum(tl.where(there & (rank >= j) & ~far, tl.exp(logit - top), 0.0), 0)
        weight = tl.where(rank == j, 1 / total, weight)
    return weight


def steps(rule: Rule) -> dict[str, int]:
    """Return the constexpr arguments for a routing rule."""
    return {"SCORES": SCORES[rule.scores], "VARIES": rule.top_p < 1,
            "GROUPS": rule.groups, "KEPT": rule.kept, "BEST": rule.group_best,
            "GP": triton.next_power_of_2(rule.groups)}  # fmt: skip
