"""Feed-forward of routed experts: the naive twin of the GEMV and the grouped GEMM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Glu:
    """gate · sigmoid(alpha · (gate + cubic · gate³)) · (up + plus), gate at most `limit` and up within ± limit before;
    0: no limit."""

    alpha: float = 1.0
    limit: float = 0.0
    plus: float = 0.0
    cubic: float = field(default=0.0, repr=False)  # of GELU alone

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if self == SILU:
            return F.silu(gate) * up
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        slope = gate + self.cubic * gate**3 if self.cubic else gate
        return gate * torch.sigmoid(self.alpha * slope) * (up + self.plus)


SILU = Glu()
GELU = Glu(alpha=(8 / math.pi) ** 0.5, cubic=0.044715)  # by tanh (arXiv 1606.08415): 1 + tanh(y) = 2 sigmoid(2 y)

Biases = Sequence[tuple[Tensor, Tensor]]  # for every expert: of gate and up concatenated [2F], of down [H]


def swiglu_experts(
    inputs: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]], glu: Glu = SILU, biases: Biases | None = None
) -> Sequence[Tensor]:
    """down glu(x gate, x up) of every expert: inputs [n, H], gate and up concatenated [H, 2F], down [F, H] → [n, H].

    Each expert is multiplied alone, so that its result does not depend on its neighbours; only the elementwise
    part is done for all at once, which saves a third of a decoded token's calls.
    """
    products = [torch.mm(x, w) for x, (w, _) in zip(inputs, weights, strict=True)]
    if biases:
        products = [product + bias for product, (bias, _) in zip(products, biases, strict=True)]
    gate, up = torch.cat(products).chunk(2, dim=-1)
    inner = glu(gate, up).split([len(x) for x in inputs])
    out = [torch.mm(x, w) for x, (_, w) in zip(inner, weights, strict=True)]
    return [product + bias for product, (_, bias) in zip(out, biases, strict=True)] if biases else out
