"""Routing rules, naive: scores → correction bias → expert groups → top-k → renormalise → scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-20  # added to what renormalising divides by, as the published code does


@dataclass(frozen=True)
class Rule:
    """Routing rule from router logits to experts and weights; its steps are in the order of the fields."""

    scores: str = "softmax"  # over all experts; sigmoid, none: the logits themselves, or mixer: see `mixed`
    biased: bool = False  # a bias is added to the scores to choose by, and not to the weights (arXiv 2408.15664)
    groups: int = 1  # of neighbouring experts …
    kept: int = 1  # … of which the best so many may be chosen from (arXiv 2405.04434)
    group_best: int = 1  # a group is as good as the sum of its best so many
    top_k: int = 1
    top_p: float = 1.0  # of the k only the first whose scores sum to so much (arXiv 2403.07652)
    renormalise: bool = False  # the k weights sum to one
    scale: float = 1.0
    jitter: float = 0.0  # of a mixer
    scaled: bool = False  # by a factor of each expert's own, last

    def __str__(self) -> str:
        steps = [
            {"softmax": "softmax over all", "sigmoid": "sigmoid", "none": "logits", "mixer": "sparse mixer"}[
                self.scores
            ]
        ]
        steps += ["correction bias"] if self.biased else []
        steps += [f"{self.kept} of {self.groups} groups"] if self.groups > self.kept else []
        steps += ["top-k" if self.top_p >= 1 else f"top-p {self.top_p:g}, at most k"] + (
            ["renormalised"] if self.renormalise else []
        )
        steps += ["a factor of each expert's"] if self.scaled else []
        return ", ".join(steps + ([f"times {self.scale:g}"] if self.scale != 1 else []))


def select(
    logits: Tensor, rule: Rule, bias: Tensor | None = None, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Router logits [T, E], bias and factors [E] → ids [T, k], the first chosen first, and weights [T, k] float32.

    Places that a top-p leaves empty have id -1 and weight 0.
    """
    if rule.scores == "mixer":
        return mixed(logits.float(), rule)
    scores = scored(logits.float(), rule.scores)
    order = scores if bias is None else scores + bias
    weights, ids = in_groups(order, rule).topk(rule.top_k, dim=-1)
    if order is not scores:
        weights = scores.gather(-1, ids)
    if rule.top_p < 1:
        empty = weights.cumsum(-1) - weights >= rule.top_p
        ids, weights = ids.masked_fill(empty, -1), weights.masked_fill(empty, 0)
    if rule.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    if factors is not None:
        weights = weights * factors[ids]
    return ids, weights if rule.scale == 1 else weights * rule.scale


def mixed(logits: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """SparseMixer-v2 (arXiv 2409.12136) after training: each choice's weight is its share of a softmax over what is
    not chosen yet and lies no further below it than 2 · jitter, of the larger of their sizes."""
    best, ids = logits.topk(rule.top_k, dim=-1)
    weights = torch.empty_like(best)
    for j in range(rule.top_k):
        top = best[:, j : j + 1]
        far = (top - logits) / torch.maximum(logits.abs(), top) > 2 * rule.jitter
        rest = logits.masked_fill(far, -torch.inf).scatter(-1, ids[:, :j], -torch.inf)
        weights[:, j] = rest.softmax(-1).gather(-1, ids[:, j : j + 1]).squeeze(-1)
    return ids, weights * rule.scale


def scored(logits: Tensor, scores: str) -> Tensor:
    if scores == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if scores == "sigmoid" else logits


def in_groups(order: Tensor, rule: Rule) -> Tensor:
    """order [T, E], -inf in the groups that are not kept."""
    if rule.groups == rule.kept:
        return order
    members = order.unflatten(-1, (rule.groups, -1))  # [T, G, E / G]
    worth = members.topk(rule.group_best, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, worth.topk(rule.kept, dim=-1).indices, True)
    return members.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(-2)
