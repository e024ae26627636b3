"""One token's norms around the parts of a layer (sandwich norms), one program per launch: all vectors are striped."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.sandwich import Sandwich


@triton.jit
def normed(x, gain, eps, H: tl.constexpr):
    """Return the RMS-normed x [WIDE] times `gain`; x is 0 from H on."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / H + eps) * gain


@triton.jit
def _attended(
    x, given, gain, gain_in, shared_expert_in, shared_expert, routed, eps,
    H: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.arange(0, WIDE)
    inside = i < H
    own, after = tl.load(gain + i, mask=inside, other=0.0), tl.load(gain_in + i, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + i, mask=inside, other=0.0) + normed(tl.load(given + i, mask=inside, other=0.0), own, eps, H)
    tl.store(x + i, value, mask=inside)
    tl.store(shared_expert_in + i, normed(value, after, eps, H), mask=inside)
    nothing = tl.zeros((WIDE,), tl.float32)
    tl.store(given + i, nothing, mask=inside)
    tl.store(shared_expert + i, nothing, mask=inside)
    tl.store(routed + i, nothing, mask=inside)


@triton.jit
def _fed(
    x, shared_expert, routed, gain_shared, gain_routed, gain, scale, eps,
    H: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.arange(0, WIDE)
    inside = i < H
    first, second = tl.load(gain_shared + i, mask=inside, other=0.0), tl.load(gain_routed + i, mask=inside, other=0.0)
    last, factor = tl.load(gain + i, mask=inside, other=0.0), tl.load(scale)
    if PDL:
        tl.extra.cuda.gdc_wait()
    both = normed(tl.load(shared_expert + i, mask=inside, other=0.0), first, eps, H)
    both += normed(tl.load(routed + i, mask=inside, other=0.0), second, eps, H)
    value = tl.load(x + i, mask=inside, other=0.0) + normed(both, last, eps, H)
    tl.store(x + i, value * factor, mask=inside)


def attended(
    x: Tensor, given: Tensor, s: Sandwich, eps: float, shared_expert_in: Tensor, shared_expert: Tensor, routed: Tensor,
    pdl: bool = False,
) -> None:  # fmt: skip
    """Add the normed attention output `given` to x [H]; norm x into `shared_expert_in` [H].

    `given`, `shared_expert` and `routed` [H], to which products add, become 0.
    """
    h = x.numel()
    _attended[(1,)](
        x,
        given,
        s.attention,
        s.shared_expert_in,
        shared_expert_in,
        shared_expert,
        routed,
        eps,
        **sizes(h),
        **dependent(pdl),
    )


def fed(x: Tensor, shared_expert: Tensor, routed: Tensor, s: Sandwich, eps: float, pdl: bool = False) -> None:
    """Update x [H] as kernels.sandwich.fed does."""
    _fed[(1,)](
        x, shared_expert, routed, s.shared_expert, s.routed, s.both, s.scale, eps, **sizes(x.numel()), **dependent(pdl)
    )  # fmt: skip


def sizes(h: int) -> dict[str, Any]:
    """Return the launch's sizes for vectors of h values."""
    wide = triton.next_power_of_2(h)
    return {"H": h, "WIDE": wide, "num_warps": min(16, max(1, wide // 256))}
