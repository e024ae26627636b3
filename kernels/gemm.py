"""Products of many tokens with routed experts, naive: unpack each expert, then multiply its tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offmoe.kernels.feed_forward import SILU, Glu
from offmoe.kernels.gemv import weights_of
from offmoe.kernels.planes import Matrix, SlotLayout


def dequantise_into(buffer: Tensor, form: Matrix, out: Tensor) -> None:
    """The matrix `form` in `buffer` uint8 [bytes] → out [rows, cols] in its type, each value rounded once."""
    out.copy_(weights_of(buffer[None], form, torch.float32)[0])


def plan_tiles(ids: Tensor, experts: int, block: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """ids [T, k], -1: none → the pairs sorted by expert, stable, and the (expert, start, end) of tiles of at most
    `block`: a tile takes the sorted pairs start … min(start + block, end); `end` is where its expert's pairs end."""
    flat = ids.reshape(-1)
    order = torch.sort(flat, stable=True).indices[(flat < 0).sum() :]
    ends = flat[flat >= 0].bincount(minlength=experts).cumsum(0).tolist()
    firsts = [0, *ends[:-1]]
    tiles = [(e, at, ends[e]) for e in range(experts) for at in range(firsts[e], ends[e], block)]
    return order, tiles


def expert_mlp(
    x: Tensor, ids: Tensor, slots: Mapping[int, Tensor], layout: SlotLayout, out: Tensor, *,
    glu: Glu = SILU, biases: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """down glu(gate x, up x) of every pair whose expert is in `slots`, unweighted: out [T · k, H]; the others stay.

    x [T, H], ids [T, k], slots: expert → uint8 [≥ layout.nbytes]; computed in the type of `out`. biases: of gate and up
    concatenated [E, 2F], of down [E, H].
    """
    k, flat = ids.shape[1], ids.reshape(-1)
    for expert, slot in slots.items():
        pairs = (flat == expert).nonzero()[:, 0]
        gate, up, down = (weights_of(slot[None], m, out.dtype)[0] for m in (layout.gate, layout.up, layout.down))
        tokens = x[pairs // k].to(out.dtype)
        wide, narrow = (bias[expert].to(out.dtype) for bias in biases) if biases else (out.new_zeros(2), 0)
        gates, ups = (tokens @ part.T + bias for part, bias in zip((gate, up), wide.chunk(2), strict=True))
        out[pairs] = glu(gates, ups) @ down.T + narrow


def combine(out: Tensor, weights: Tensor) -> Tensor:
    """Σ_j weights[t, j] · out[t · k + j] in float32, in the order of j: out [T · k, H], weights [T, k] → [T, H].

    What stands at a weight of 0 may be anything.
    """
    products = out.float().unflatten(0, weights.shape) * weights.unsqueeze(2)
    products = products.masked_fill(weights.unsqueeze(2) == 0, 0)
    total = products[:, 0]
    for j in range(1, weights.shape[1]):
        total = total + products[:, j]
    return total
