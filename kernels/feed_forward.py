"""The product of one expert: the naive twin of the GEMV and the grouped GEMM."""

import torch.nn.functional as F
from torch import Tensor


def swiglu_expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [n, H], gate over up [2F, H], down [H, F] → down(silu(gate x) · up x) [n, H]."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)
