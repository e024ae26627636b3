"""Naive attention over a KV cache whose length is on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int = 0, sinks: Tensor | None = None,
    scale: float | None = None, chunked: bool = False,
) -> Tensor:  # fmt: skip
    """Causal grouped-query attention.

    q [T, heads, D] at positions [T] (int64, on the device); keys [kv_heads, S, D] and values [kv_heads, S, V], where S
    is a bucket of context: what lies behind a query's position is masked, so no length is read by the host.
    window: a query sees its own position and window - 1 before it; 0: all; chunked: those before it from a multiple of
    window on. sinks [heads]: a logit more in every
    softmax, whose value is 0 (arXiv 2309.17453, learned). Scores are multiplied by `scale`, D ** -0.5 where it is
    None. Returns [T, heads, V].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    places = torch.arange(keys.shape[1], device=q.device)
    visible = places <= positions.unsqueeze(1)  # [T, S]
    if window:
        visible &= places >= oldest_seen(positions, window, chunked).unsqueeze(1)
    if len(q) == 1 or sinks is not None:  # of one query two products take a third of the time that F's take below
        grouped = q.unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)  # [kv_heads, heads a group, T, D]
        scores = (grouped.flatten(1, 2) @ keys.mT * scale).view(*grouped.shape[:3], -1)
        scores = scores.masked_fill(~visible, -torch.inf).float()
        if sinks is not None:
            extra = sinks.float().view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, extra), dim=-1)
        shares = scores.softmax(-1)[..., : keys.shape[1]].to(values.dtype)
        return (shares.flatten(1, 2) @ values).view(*grouped.shape[:3], -1).permute(2, 0, 1, 3).flatten(1, 2)
    mixed = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=visible,
        enable_gqa=True,
        scale=scale,
    )
    return mixed.squeeze(0).transpose(0, 1)


def oldest_seen(positions: Tensor, window: int, chunked: bool) -> Tensor:
    """Return the first position that a query at each of `positions` sees; below 0: all."""
    return positions // window * window if chunked else positions - (window - 1)
