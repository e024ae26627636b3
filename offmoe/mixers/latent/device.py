"""Latent attention on a GPU: a prompt's chunk expands keys and values, the decode step absorbs them (kernels.mla)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offmoe.kernels.gpu import gemv, mla, norm_rope, prefill
from offmoe.kernels.mla import HEADS_AT_ONCE, LATENT_EPS, Latent, expand
from offmoe.kernels.row_blocks import row_blocks
from offmoe.kernels.striped import stripe, unstripe
from offmoe.mixers.latent.cache import LatentCache
from offmoe.mixers.latent.config import LatentConfig
from offmoe.mixers.latent.rows import head_rows, positioned, transposed
from offmoe.mixers.protocols import DeviceTensors, Part, Scratch, StepTensors
from offmoe.mixers.unpacked import product, unpacked


@dataclass(frozen=True)
class LatentWeights:
    """Weights of one layer beyond its projections; rows in the order of `rows.py`, striped."""

    q_a_norm: Tensor | None  # [q_rank], where queries have a latent, which in_proj makes
    q_b: tuple[Part, ...]  # [heads · (N + R), q_rank]
    kv_a_norm: Tensor  # [L]
    k_b: Part  # [heads · L, N]
    v_b: Part  # [heads · V, L]


def load_weights(config: LatentConfig, tensors: DeviceTensors) -> LatentWeights:
    z = config.latent
    if tensors.has("k_b"):
        k_b, v_b = tensors.raw("k_b"), tensors.raw("v_b")
    else:
        fmt, raw = tensors.raw("kv_b")
        keys, values = head_rows(raw, config.heads, z)
        k_b, v_b = transposed(fmt, keys, config.heads, z), (fmt, values.flatten(0, 1))
    return LatentWeights(
        q_a_norm=stripe(tensors.load("q_a_norm")) if z.q_rank else None,
        q_b=tensors.parts("q_b", cols=z.q_rank) if z.q_rank else (),
        kv_a_norm=tensors.load("kv_a_norm"),
        k_b=tensors.in_slots(*k_b, z.qk_nope),
        v_b=tensors.in_slots(*v_b, z.kv_rank),
    )


class Device:
    """Latent attention of one layer."""

    def __init__(self, config: LatentConfig, tensors: DeviceTensors) -> None:
        self.config, self.weights = config, load_weights(config, tensors)
        self._rope = tensors.ropes.table(config.rope)

    def tensors(self) -> list[Tensor]:
        w = self.weights
        norms = [w.kv_a_norm, *([] if w.q_a_norm is None else [w.q_a_norm])]
        return [*norms, *(part[0] for part in (*w.q_b, w.k_b, w.v_b))]

    def mix(self, projected: Tensor, cache: LatentCache, positions: Tensor, start: int) -> Tensor:
        c, w, z, dtype = self.config, self.weights, self.config.latent, projected.dtype
        query, fresh = projected.split((projected.shape[1] - z.width, z.width), dim=1)
        if w.q_a_norm is not None:
            query = query.contiguous()
            normed = norm_rope.rms_norm(query, w.q_a_norm, LATENT_EPS, torch.empty_like(query), None)
            query = product(unstripe(normed), w.q_b)
        nope = c.heads * z.qk_nope
        query = torch.cat((unstripe(query[:, :nope]), query[:, nope:]), dim=1)
        unrotated, rotated, rows = positioned(query, fresh, w.kv_a_norm, self._rope, positions, c.heads, z)
        end = start + len(rows)
        cache.rows[start:end] = rows
        queries, known = torch.cat((unrotated, rotated), dim=2), cache.rows[:end].to(dtype)
        k_b = unpacked((w.k_b,), z.qk_nope, dtype).unflatten(0, (c.heads, -1))
        v_b = unpacked((w.v_b,), z.kv_rank, dtype).unflatten(0, (c.heads, -1))
        mixed = queries.new_empty((len(rows), c.heads, z.value))
        for first in range(0, c.heads, HEADS_AT_ONCE):
            some = slice(first, first + HEADS_AT_ONCE)
            keys, values = expanded(known, k_b[some], v_b[some], z)
            q = F.pad(queries[:, some], (0, keys.shape[2] - z.key))
            mixed[:, some] = prefill.prefill_attention(q, keys, values, start, scale=c.score_scale)[..., : z.value]
        return mixed.flatten(1)

    def scratch(self, ctx: int, sms: int, device: torch.device) -> Scratch:
        c, z = self.config, self.config.latent
        splits, _ = mla.pick_splits(ctx, c.heads, sms)
        return {
            "partial": (mla.partial_size(c.heads, z, splits, device), torch.float32),
            "query": (c.heads * z.key, torch.float32),
            "absorbed": (c.heads * z.kv_rank, torch.float32),
        }

    def launch(self, projected: Tensor, mixed: Tensor, cache: LatentCache, step: StepTensors) -> None:
        """Three launches, four where queries have a latent."""
        c, w, z = self.config, self.weights, self.config.latent
        splits, split_size = mla.pick_splits(step.ctx, c.heads, step.sms)
        query = projected
        if w.q_b:
            query = step.scratch["query"][None]
            gemv.dense(projected[:, : z.q_rank], w.q_b, query, norm=w.q_a_norm, eps=LATENT_EPS, pdl=step.pdl)
        mla.decode_latents(
            query[0, : c.heads * z.key], projected[0, -z.width :], cache.rows, step.position, self._rope, w.kv_a_norm,
            w.k_b, w.v_b, mixed[0], step.scratch["absorbed"], step.scratch["partial"], heads=c.heads, latent=z,
            scale=c.score_scale, splits=splits, split_size=split_size, pdl=step.pdl,
        )  # fmt: skip


def expanded(known: Tensor, k_b: Tensor, v_b: Tensor, z: Latent) -> tuple[Tensor, Tensor]:
    """kernels.mla.expand, a block of positions at a time; keys and values are padded to one width [heads, S, W]."""
    shape = (len(k_b), len(known), max(z.key, z.value))
    keys, values = known.new_zeros(shape), known.new_zeros(shape)
    for rows in row_blocks(len(known)):
        keys[:, rows, : z.key], values[:, rows, : z.value] = expand(known[rows], k_b, v_b)
    return keys, values
