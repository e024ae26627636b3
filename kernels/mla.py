"""Multi-head latent attention (arXiv 2405.04434), naive: keys and values of all heads come from one latent per
position.

The cache holds the normed latent and one rotated key, shared by all heads. Decoding never expands it: a head's query is
projected into the latent space (`absorb`), and the mixed latents are projected back (`values_of`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offmoe.kernels.attention import attention

LATENT_EPS = 1e-6  # of the norms of latents, whatever the model's other norms take
HEADS_AT_ONCE = 16  # whose keys and values a prompt's chunk expands together on a GPU


@dataclass(frozen=True)
class Latent:
    """Widths: of the latents of queries (0: queries have none) and of keys and values; of a head's key without and
    with position; of a head's value."""

    q_rank: int
    kv_rank: int
    qk_nope: int
    qk_rope: int
    value: int

    @property
    def width(self) -> int:
        """Values per position in the cache."""
        return self.kv_rank + self.qk_rope

    @property
    def key(self) -> int:
        """Values of a head's key or query."""
        return self.qk_nope + self.qk_rope


def absorb(qk_nope: Tensor, k_b: Tensor) -> Tensor:
    """Project queries [T, heads, N] into the latent space [T, heads, L]; k_b [heads, L, N]."""
    return torch.einsum("thn,hln->thl", qk_nope, k_b)


def values_of(mixed: Tensor, v_b: Tensor) -> Tensor:
    """Mixed latents [T, heads, L] → values [T, heads, V]; v_b [heads, V, L]."""
    return torch.einsum("thl,hvl->thv", mixed, v_b)


def latent_attention(
    qk_nope: Tensor, qk_rope: Tensor, cache: Tensor, k_b: Tensor, v_b: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """Causal; queries [T, heads, N] and, rotated, [T, heads, R]; cache [S, L + R] → [T, heads, V].

    As attention over one key-value head, whose value is the front of its key. See `attention` for S and positions.
    """
    query = torch.cat((absorb(qk_nope, k_b), qk_rope), dim=-1)
    mixed = attention(query, cache[None], cache[None, :, : k_b.shape[1]], positions, scale=scale)
    return values_of(mixed, v_b)


def expand(cache: Tensor, k_b: Tensor, v_b: Tensor) -> tuple[Tensor, Tensor]:
    """Expand latents [S, L + R] to keys [heads, S, N + R] and values [heads, S, V] of the heads in k_b
    [heads, L, N] and v_b [heads, V, L]."""
    latent, qk_rope = cache.split((k_b.shape[1], cache.shape[1] - k_b.shape[1]), dim=1)
    keys = torch.cat((latent @ k_b, qk_rope.expand(len(k_b), -1, -1)), dim=2)
    return keys, latent @ v_b.transpose(1, 2)
