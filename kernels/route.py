"""Routing rules, naive."""

from __future__ import annotations

from torch import Tensor


def softmax_top_k(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] → ids [T, k] by falling probability, weights [T, k] float32.

    The softmax runs over all experts; `renormalise` makes the k weights sum to one.
    """
    weights, ids = logits.float().softmax(dim=-1).topk(k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids, weights
