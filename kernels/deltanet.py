"""Gated DeltaNet (arXiv 2412.06464), naive: a short convolution, then a memory of one matrix a head in place of keys.

In float32 throughout: the memory S [key_dim, value_dim] is carried over a whole context. A token decays it, takes out
what its key k recalls and puts in its value v: S ← e^g S + k ⊗ β (v − kᵀ e^g S); it reads qᵀ S. A prompt takes BLOCK
tokens at once (arXiv 2406.06484): what the tokens of a block do to one another is one triangular system.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offmoe.kernels.norm_rope import rms_norm
from offmoe.kernels.shortconv import short_convolution

BLOCK = 64  # tokens that share a triangular system
UNIT_EPS = 1e-6  # under the root of a key's or query's length


@dataclass(frozen=True)
class Delta:
    """Shape of a Gated DeltaNet layer; a key head serves value_heads / key_heads value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int  # of the short convolution

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: q, k and v."""
        return 2 * self.keys + self.values

    @property
    def memory(self) -> tuple[int, ...]:
        """The shape of what all heads carry along."""
        return self.value_heads, self.key_dim, self.value_dim

    @property
    def projected(self) -> tuple[int, int, int, int]:
        """Rows of the projections: q, k and v; the output gate z; b for β; a for the decay."""
        return self.channels, self.values, self.value_heads, self.value_heads


@dataclass(frozen=True)
class DeltaWeights:
    """Weights of a layer besides its projections, float32."""

    shape: Delta
    conv: Tensor  # [taps, channels]: the last tap is the present token's
    decay: Tensor  # [value_heads], below 0
    dt: Tensor  # [value_heads], added to a
    norm: Tensor  # [value_dim]
    eps: float
    tiled: bool  # value head h is served by key head h % key_heads, as llama.cpp orders them; else they are in runs

    def tensors(self) -> list[Tensor]:
        return [self.conv, self.decay, self.dt, self.norm]


def delta_mix(projected: Tensor, w: DeltaWeights, memory: Tensor, recent: Tensor, start: int) -> Tensor:
    """The T tokens from position `start` on: projected [T, sum of Delta.projected] → [T, values] float32.

    memory [value_heads, key_dim, value_dim] and recent [taps, channels] (the inputs of the convolution, that of
    position p in row p % taps), both float32, are carried on in place.
    """
    d = w.shape
    x, z, b, a = projected.float().split(d.projected, dim=-1)
    mixed = F.silu(short_convolution(x, w.conv, recent, start))
    q, k, v = mixed.split((d.keys, d.keys, d.values), dim=-1)
    q, k = (served(unit(t.unflatten(-1, (d.key_heads, -1))), w) for t in (q, k))
    v, z = (t.unflatten(-1, (d.value_heads, -1)) for t in (v, z))
    g, beta = w.decay * F.softplus(a + w.dt), b.sigmoid()
    rule = recurrent if len(x) == 1 else chunked
    out = rule(q * d.key_dim**-0.5, k, v, g, beta, memory)
    return (rms_norm(out, w.norm, w.eps) * F.silu(z)).flatten(1)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)


def served(x: Tensor, w: DeltaWeights) -> Tensor:
    """Queries or keys [T, key_heads, D] → one for every value head."""
    times = w.shape.value_heads // w.shape.key_heads
    return x.repeat(1, times, 1) if w.tiled else x.repeat_interleave(times, dim=1)


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor) -> Tensor:
    """Token by token: q, k [T, heads, K], v [T, heads, V], g and beta [T, heads] → [T, heads, V]; memory in place."""
    out = torch.empty_like(v)
    for t in range(len(v)):
        memory *= g[t].exp()[:, None, None]
        change = beta[t, :, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], memory))
        memory += k[t, :, :, None] * change[:, None]
        out[t] = torch.einsum("hk,hkv->hv", q[t], memory)
    return out


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor) -> Tensor:
    """The same, BLOCK tokens at once.

    With G the running sum of g in a block and Λ_ij = e^(G_i − G_j) for j ≤ i, what token i puts in is row i of
    U − W S, where (I + strictly lower (β K Kᵀ Λ)) [U, W] = β [V, e^G K].
    """
    count = len(v)
    q, k, v, g, beta = (in_blocks(x) for x in (q, k, v, g, beta))  # [heads, blocks, BLOCK, …]
    total = g.cumsum(-1)
    behind = torch.ones((BLOCK, BLOCK), dtype=torch.bool, device=v.device).triu(1)
    lasting = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(behind, -torch.inf).exp()
    system = beta.unsqueeze(-1) * (k @ k.mT) * lasting  # its diagonal is taken for ones below
    sides = beta.unsqueeze(-1) * torch.cat((v, total.exp().unsqueeze(-1) * k), dim=-1)
    put, recalled = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split(
        (v.shape[-1], k.shape[-1]), dim=-1
    )
    inside, across = (q @ k.mT) * lasting, total.exp().unsqueeze(-1) * q
    left = (total[..., -1:] - total).exp().unsqueeze(-1) * k  # of a key at the end of its block
    kept = total[..., -1].exp()[..., None, None]
    out = torch.empty_like(v)
    for n in range(v.shape[1]):
        change = put[:, n] - recalled[:, n] @ memory
        out[:, n] = across[:, n] @ memory + inside[:, n] @ change
        memory.copy_(kept[:, n] * memory + left[:, n].mT @ change)
    return out.flatten(1, 2)[:, :count].transpose(0, 1)


def in_blocks(x: Tensor) -> Tensor:
    """Reshape [T, heads, …] to [heads, blocks, BLOCK, …]; padding tokens are 0 and change nothing."""
    short = -len(x) % BLOCK
    return F.pad(x.transpose(0, 1), (0, 0) * (x.ndim - 2) + (0, short)).unflatten(1, (-1, BLOCK))
