"""Latent attention on the CPU, in plain torch: the reference for `device.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from offmoe.kernels.mla import LATENT_EPS, latent_attention
from offmoe.kernels.norm_rope import rms_norm
from offmoe.machine.crew import ROWS, product, share
from offmoe.mixers.cache import bucket
from offmoe.mixers.latent.cache import LatentCache
from offmoe.mixers.latent.config import LatentConfig
from offmoe.mixers.latent.rows import head_rows, positioned
from offmoe.mixers.protocols import Tensors


@dataclass(frozen=True)
class LatentWeights:
    """Weights of one layer beyond its projections."""

    q_a_norm: Tensor | None  # [q_rank], where queries have a latent, which in_proj makes
    q_b: Tensor | None  # [q_rank, heads · (N + R)]
    kv_a_norm: Tensor  # [L]
    k_b: Tensor  # [heads, L, N]
    v_b: Tensor  # [heads, V, L]


def load_weights(config: LatentConfig, tensors: Tensors) -> LatentWeights:
    z = config.latent
    if tensors.has("k_b"):
        k_b, v_b = tensors.load("k_b"), tensors.load("v_b")
    else:
        keys, v_b = head_rows(tensors.load("kv_b"), config.heads, z)
        k_b = keys.transpose(1, 2)
    return LatentWeights(
        q_a_norm=tensors.load("q_a_norm") if z.q_rank else None,
        q_b=tensors.load("q_b").t().contiguous() if z.q_rank else None,
        kv_a_norm=tensors.load("kv_a_norm"),
        k_b=k_b.contiguous(),
        v_b=v_b.contiguous(),
    )


class Host:
    """Latent attention of one layer."""

    def __init__(self, config: LatentConfig, tensors: Tensors) -> None:
        self.config, self.weights = config, load_weights(config, tensors)
        self._rope = tensors.ropes.table(config.rope)

    def tensors(self) -> list[Tensor]:
        return [weight for weight in vars(self.weights).values() if weight is not None]

    def mix(self, projected: Tensor, cache: LatentCache, positions: Tensor, start: int) -> Tensor:
        c, w, z = self.config, self.weights, self.config.latent
        query, fresh = projected.split((projected.shape[1] - z.width, z.width), dim=1)
        if w.q_b is not None and w.q_a_norm is not None:
            query = product(rms_norm(query, w.q_a_norm, LATENT_EPS), w.q_b)
        nope, rotated, rows = positioned(query, fresh, w.kv_a_norm, self._rope, positions, c.heads, z)
        cache.write(rows, positions)
        mixed = nope.new_empty((len(projected), c.heads, z.value))

        def attend(some: slice) -> None:
            known = cache.rows[: bucket(start + min(some.stop, len(projected)), cache.ctx)]
            mixed[some] = latent_attention(
                nope[some], rotated[some], known, w.k_b, w.v_b, positions[some], c.score_scale
            )

        share(partial(attend, slice(row, row + ROWS)) for row in range(0, len(projected), ROWS))
        return mixed.flatten(1)
