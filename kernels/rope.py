"""Rotary embedding: angle per position of each pair, and its scalings for contexts longer than trained.

Sources: RoPE arXiv 2104.09864, position interpolation 2306.15595, YaRN 2309.00071, LongRoPE 2402.13753; `dynamic` and
`llama3` as transformers computes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PROPORTIONAL = "proportional"  # Gemma 4's, of its own config
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Scaling:
    """One of KINDS, and the numbers that it uses."""

    kind: str = "default"
    factor: float = 1.0
    original: int = 0  # positions trained before scaling
    attention: float = 1.0  # cos and sin are multiplied by it (yarn, longrope)
    scores: float = 1.0  # factor of q · k in addition to 1 / √D: DeepSeek's mscale_all_dim
    fast: float = 32.0  # yarn: pairs that turn more often than this within `original` stay …
    slow: float = 1.0  # … those that turn less often are interpolated; also llama3's high and low factors
    truncate: bool = True  # yarn: the bounds of the ramp between are whole numbers
    short: tuple[float, ...] = ()  # longrope, a factor a pair: for contexts up to `original` …
    long: tuple[float, ...] = ()  # … and for longer ones
    share: float = (
        1.0  # proportional: share of the pairs that are rotated, with the frequencies that all pairs would have
    )


PLAIN = Scaling()


@dataclass(frozen=True)
class AttentionTemperature:
    """Queries are multiplied by 1 + scale · ln(1 + ⌊(position + 1) / floor⌋), so that attention stays sharp over a long
    context (Llama 4; arXiv 2501.19399)."""

    floor: int
    scale: float

    def table(self, ctx: int, device: torch.device) -> Tensor:
        """Return the temperature of every position, [ctx] float32."""
        steps = torch.floor((torch.arange(ctx).float() + 1) / self.floor)
        return (1 + self.scale * torch.log1p(steps)).to(device)


def no_rope_table(ctx: int, device: torch.device) -> Tensor:
    """A `rope_table` that leaves all as it is; two columns, for none is no tensor of a kernel's."""
    return torch.stack((torch.ones(ctx, 2), torch.zeros(ctx, 2))).to(device)


def inverse_frequencies(dim: int, theta: float, ctx: int, scaling: Scaling = PLAIN) -> Tensor:
    """Radians a position of every pair, float32 [dim / 2], for a context of `ctx` positions.

    `dynamic` and `longrope` depend on the length: one is chosen for all of a context, so that keys stay as they are.
    """
    s = scaling
    if s.kind == "dynamic":
        theta *= (s.factor * max(ctx, s.original) / s.original - (s.factor - 1)) ** (dim / (dim - 2))
    inverse = theta ** -(torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if s.kind == PROPORTIONAL:
        inverse[int(s.share * dim // 2) :] = 0
    if s.kind == "linear":
        return inverse / s.factor
    if s.kind == "yarn":
        kept = 1 - ramp(*yarn_bounds(dim, theta, s), dim // 2)
        return inverse / s.factor * (1 - kept) + inverse * kept
    if s.kind == "longrope":
        return inverse / torch.tensor(s.long if ctx > s.original else s.short)
    if s.kind == "llama3":
        turns = s.original * inverse / (2 * math.pi)
        kept = ((turns - s.slow) / (s.fast - s.slow or 1e-6)).clamp(0, 1)
        return inverse / s.factor * (1 - kept) + inverse * kept
    return inverse


def frequency_factors(dim: int, theta: float, scaling: Scaling) -> Tensor:
    """Return the divisor of every pair's frequency [dim / 2], as llama.cpp stores it: 1e30 for a pair not rotated."""
    scaled = inverse_frequencies(dim, theta, 1, scaling)
    return torch.where(scaled > 0, inverse_frequencies(dim, theta, 1) / scaled, 1e30)


def yarn_bounds(dim: int, theta: float, s: Scaling) -> tuple[float, float]:
    """The pairs that turn `fast` and `slow` times within `original` positions."""
    low, high = (
        dim * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (s.fast, s.slow)
    )
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def ramp(low: float, high: float, count: int) -> Tensor:
    """0 up to `low`, 1 from `high` on [count]."""
    return ((torch.arange(count).float() - low) / ((high - low) or 0.001)).clamp(0, 1)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return the factor that keeps the entropy of attention over a context `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_table(ctx: int, dim: int, theta: float, device: torch.device, scaling: Scaling = PLAIN) -> Tensor:
    """cos and sin of every position, [2, ctx, dim] float32, each half repeated (NEOX order)."""
    angle = torch.outer(torch.arange(ctx).float(), inverse_frequencies(dim, theta, ctx, scaling))
    angle = torch.cat((angle, angle), dim=-1)
    return (torch.stack((angle.cos(), angle.sin())) * scaling.attention).to(device)
