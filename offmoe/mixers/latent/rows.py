"""Row orders of latent attention's matrices, and what positions make of the products of its projections.

Files have the rotated pairs of a head as neighbours (transformers' rope_interleave); rows are put into halves as they
are read, in every format. Queries keep the unrotated (qk_nope) parts of all heads in front of the rotated (qk_rope)
ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.kernels.formats import FORMATS, as_it_lies, dequantise
from offmoe.kernels.mla import LATENT_EPS, Latent
from offmoe.kernels.norm_rope import rms_norm, rope
from offmoe.kernels.striped import stripe

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def halves(pairs: Tensor) -> Tensor:
    """Neighbouring pairs [..., R] → the first of each pair, then the second of each (NEOX)."""
    return pairs.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def query_rows(heads: int, z: Latent, striped: bool = False) -> Tensor:
    """Row indices, int64, that reorder a file's query projection [heads · (N + R), …].

    striped: the unrotated parts are in the order of kernels.striped, all heads together.
    """
    rows = torch.arange(heads * z.key).view(heads, z.key)
    nope, rotated = rows[:, : z.qk_nope].flatten(), halves(rows[:, z.qk_nope :]).flatten()
    return torch.cat((stripe(nope) if striped else nope, rotated))


def latent_rows(z: Latent) -> Tensor:
    """Row indices that reorder a file's projection into the cache [L + R, …]."""
    rows = torch.arange(z.width)
    return torch.cat((rows[: z.kv_rank], halves(rows[z.kv_rank :])))


def head_rows(kv_b: Tensor, heads: int, z: Latent) -> tuple[Tensor, Tensor]:
    """Rows of all heads [heads · (N + V), …] → rows of their keys [heads, N, …] and of their values [heads, V, …]."""
    keys, values = kv_b.unflatten(0, (heads, -1)).split((z.qk_nope, z.value), dim=1)
    return keys, values


def transposed(fmt: str, raw: Tensor, heads: int, z: Latent) -> tuple[str, Tensor]:
    """Key rows of all heads, uint8 [heads, N, bytes of L weights] → format and bytes [heads · L, bytes of N weights].

    Blocks cannot be transposed: quantised rows become float16.
    """
    contiguous = torch.stack([as_it_lies(rows, FORMATS[fmt]) for rows in raw])
    weight = dequantise(contiguous, fmt, z.qk_nope, z.kv_rank, FLOATS.get(fmt, torch.float16))
    weight = weight.transpose(1, 2).contiguous()
    return fmt if fmt in FLOATS else "F16", weight.view(torch.uint8).view(heads * z.kv_rank, -1)


def positioned(
    query: Tensor, fresh: Tensor, norm: Tensor, table: Tensor, positions: Tensor, heads: int, z: Latent
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries [T, heads · (N + R)], all N first, and make cache rows of `fresh` [T, L + R].

    Returns the unrotated queries [T, heads, N], the rotated ones [T, heads, R], and the cache's rows [T, L + R].
    """
    nope, rotated = query.split((heads * z.qk_nope, heads * z.qk_rope), dim=1)
    latent, key = fresh.split((z.kv_rank, z.qk_rope), dim=1)
    rotated = rope(torch.cat((rotated, key), dim=1).unflatten(1, (heads + 1, z.qk_rope)), table, positions)
    rows = torch.cat((rms_norm(latent, norm, LATENT_EPS).to(rotated.dtype), rotated[:, heads]), dim=1)
    return nope.unflatten(1, (heads, z.qk_nope)), rotated[:, :heads], rows
