"""Latent attention in a trunk, on the CPU and on a GPU: in which order rows are kept, and what a chunk's positions make
of the products of its projections.

Files have the rotated pairs of a head side by side (transformers' rope_interleave); rows are put into halves as they
are read, whatever their format. Queries keep the unrotated parts of all heads in front of the rotated ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.formats import FORMATS, as_it_lies, dequantise
from offmoe.kernels.mla import LATENT_EPS, Latent
from offmoe.kernels.norm_rope import rms_norm, rope
from offmoe.kernels.striped import stripe
from offmoe.models.config import ModelConfig

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def halves(pairs: Tensor) -> Tensor:
    """[..., R] of neighbouring pairs → the first of each, then the second (NEOX)."""
    return pairs.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def query_rows(heads: int, z: Latent, striped: bool = False) -> Tensor:
    """Which row of a file's query projection [heads · (N + R), …] stands where: int64. Unrotated parts may be striped
    (kernels.striped), all heads together."""
    rows = torch.arange(heads * z.key).view(heads, z.key)
    plain, turned = rows[:, : z.qk_nope].flatten(), halves(rows[:, z.qk_nope :]).flatten()
    return torch.cat((stripe(plain) if striped else plain, turned))


def latent_rows(z: Latent) -> Tensor:
    """The same of the projection into the cache [L + R, …]."""
    rows = torch.arange(z.width)
    return torch.cat((rows[: z.kv_rank], halves(rows[z.kv_rank :])))


def rows_of(role: str, config: ModelConfig, striped: bool = False) -> Tensor | None:
    """In which order a trunk keeps a file's rows, where it is another. striped: what the decode step multiplies next is
    (kernels.striped), the latents of queries too."""
    z = config.latent
    if z is None:
        return None
    if role == "q_a":
        return stripe(torch.arange(z.q_rank)) if striped else None
    if role in ("q", "q_b"):
        return query_rows(config.heads, z, striped)
    return latent_rows(z) if role == "kv_a" else None


def head_rows(kv_b: Tensor, heads: int, z: Latent) -> tuple[Tensor, Tensor]:
    """Rows of all heads [heads · (N + V), …] → those of their keys [heads, N, …] and of their values [heads, V, …]."""
    keys, values = kv_b.unflatten(0, (heads, -1)).split((z.qk_nope, z.value), dim=1)
    return keys, values


def transposed(fmt: str, raw: Tensor, heads: int, z: Latent) -> tuple[str, Tensor]:
    """Key rows of all heads, uint8 [heads, N, row bytes] of L weights → format and bytes [heads · L, row bytes] of N.

    Blocks cannot be transposed: what is quantised becomes float16.
    """
    lying = torch.stack([as_it_lies(rows, FORMATS[fmt]) for rows in raw])
    weight = dequantise(lying, fmt, z.qk_nope, z.kv_rank, FLOATS.get(fmt, torch.float16))
    turned = weight.transpose(1, 2).contiguous()
    return fmt if fmt in FLOATS else "F16", turned.view(torch.uint8).view(heads * z.kv_rank, -1)


def positioned(
    query: Tensor, fresh: Tensor, norm: Tensor, table: Tensor, positions: Tensor, heads: int, z: Latent
) -> tuple[Tensor, Tensor, Tensor]:
    """query [T, heads · (N + R)], all N first, and fresh [T, L + R] → the unrotated queries [T, heads, N], the rotated
    ones [T, heads, R], and what goes into the cache [T, L + R]."""
    plain, turned = query.split((heads * z.qk_nope, heads * z.qk_rope), dim=1)
    latent, key = fresh.split((z.kv_rank, z.qk_rope), dim=1)
    turned = rope(torch.cat((turned, key), dim=1).unflatten(1, (heads + 1, z.qk_rope)), table, positions)
    rows = torch.cat((rms_norm(latent, norm, LATENT_EPS).to(turned.dtype), turned[:, heads]), dim=1)
    return plain.unflatten(1, (heads, z.qk_nope)), turned[:, :heads], rows
