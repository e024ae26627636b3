"""The experts of a few tokens out of slots, naive: unpack whole matrices, then multiply.

All is computed in the type of what is written: float64 outputs make the reference of kernels.gpu.experts. Vectors that
are read here are striped (kernels.striped).
"""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.feed_forward import SILU, Glu
from offmoe.kernels.gemv import weights_of
from offmoe.kernels.planes import SlotLayout
from offmoe.kernels.striped import stripe, unstripe


def expert_gate_up(
    records: Tensor, layout: SlotLayout, slots: Tensor, weights: Tensor, x: Tensor, out: Tensor, *,
    glu: Glu = SILU, ids: Tensor | None = None, bias: Tensor | None = None, before: bool = False,
) -> None:  # fmt: skip
    """Compute weight · glu(gate x, up x) of every (token, expert) pair into out [P, F], striped.

    records [S, stride] uint8, slots [P] int32, weights [P], x [T, H] striped. `bias` [E, 2F] holds gate's and up's
    biases concatenated; `ids` [P] are the experts. Pair p belongs to token p // (P / T); nothing is computed for a pair
    in slot -1. `before`: glu(weight · gate x, weight · up x) instead.
    """
    of_token = unstripe(x).to(out.dtype).repeat_interleave(len(slots) // len(x), dim=0)
    for pair, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        gate, up = (weights_of(records[slot][None], form, out.dtype)[0] for form in (layout.gate, layout.up))
        both = torch.stack((gate @ of_token[pair], up @ of_token[pair]))
        if bias is not None and ids is not None:
            both += bias[ids[pair]].view(both.shape)
        weight = weights[pair].to(out.dtype)
        out[pair] = stripe(glu(*(both * weight)) if before else glu(*both) * weight)


def expert_down(
    records: Tensor, layout: SlotLayout, slots: Tensor, inner: Tensor, x: Tensor, *,
    ids: Tensor | None = None, weights: Tensor | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """x [T, H] += Σ_j down_j inner[t, j]; `inner` is weighted already.

    records [S, stride] uint8, slots [T · k], inner [T · k, F] and x striped. `bias` [E, H] of experts `ids` [T · k] is
    added, times `weights` [T · k].
    """
    down = weights_of(records[slots.long().clamp(min=0)], layout.down, x.dtype)  # [P, H, F]
    products = (down @ unstripe(inner).to(x.dtype).unsqueeze(2)).squeeze(2)
    if bias is not None and ids is not None and weights is not None:
        products += bias[ids.long()].to(x.dtype) * weights.to(x.dtype).unsqueeze(1)
    products[slots < 0] = 0
    x += stripe(products.unflatten(0, (len(x), -1)).sum(1))
