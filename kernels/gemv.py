"""Products of a few tokens with quantised matrices out of slots, naive: unpack the whole matrix, then multiply.

All is computed in the type of what is written: float64 outputs make the reference of kernels.gpu.gemv. Vectors that
are read here are striped (kernels.striped).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offmoe.kernels.formats import dequantise
from offmoe.kernels.planes import Matrix, unplane
from offmoe.kernels.striped import stripe, unstripe

Part = tuple[Tensor, Matrix]


def weights_of(slots: Tensor, form: Matrix, dtype: torch.dtype) -> Tensor:
    """A matrix out of slots uint8 [n, …]: [n, rows, cols]."""
    return dequantise(unplane(slots, form), form.format, form.rows, form.cols, dtype)


def dense(
    x: Tensor, parts: Sequence[Part], out: Tensor, *,
    norm: Tensor | None = None, eps: float = 0.0, bias: Tensor | None = None, residual: bool = False,
) -> None:  # fmt: skip
    """x [T, K], striped, times the transpose of matrices, rows one after another: out [T, N].

    norm [K], striped: x is RMS-normed with it first. residual: `out` is the residual stream, striped, and is added
    to; else it is in natural order. `bias` [N], in natural order, is added.
    """
    x = unstripe(x).to(out.dtype)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * unstripe(norm).to(out.dtype)
    result = torch.cat([x @ weights_of(buffer[None], form, out.dtype)[0].T for buffer, form in parts], dim=1)
    if bias is not None:
        result = result + bias.to(out.dtype)
    out.copy_(out + stripe(result) if residual else result)
