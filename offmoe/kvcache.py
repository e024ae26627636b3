"""Keys and values of the tokens so far, in memory reserved at start; positions live on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from offmoe.memory import host_memory
from offmoe.models.config import ModelConfig
from offmoe.states import States

BUCKET = 256  # attention reads whole buckets, so that shapes change rarely and never with a host's decision


class KVCache:
    """Static buffers [layers with keys, kv_heads, ctx, head_dim], and the ids that they hold; `states` of the others.

    Of latent attention (kernels.mla) a row a position, [layers, 1, ctx, L + R]: the value is the front of the key.
    In int8 each head's key or value has a float32 scale a position, `scales` [layers, 2, kv_heads, ctx].
    """

    def __init__(
        self, config: ModelConfig, ctx: int, device: torch.device, dtype: torch.dtype, int8: bool = False
    ) -> None:
        self.ctx = ctx
        self.tokens: list[int] = []  # whose keys and values are written
        self._at = {layer: i for kind in (config.attended, config.delta_layers) for i, layer in enumerate(kind)}
        self.states = States(config, device) if config.delta else None
        z, kept = config.latent, torch.int8 if int8 else dtype
        shape = (len(config.attended), config.kv_heads, ctx, z.width if z else config.head_dim)
        self._keys = zeros(shape, device, kept)
        self._values = self._keys[..., : z.kv_rank] if z else zeros(shape, device, kept)
        self._scales = zeros((shape[0], 2, *shape[1:3]), device, torch.float32) if int8 else None

    def state_of(self, layer: int) -> tuple[States, int]:
        """Of a layer without keys, and its number among these."""
        assert self.states, f"layer {layer} has keys and values"
        return self.states, self._at[layer]

    @contextmanager
    def extending(self, ids: list[int]) -> Iterator[None]:
        """Inside, all layers run `ids` behind the tokens held; they are held afterwards."""
        if self.states:
            self.states.begin(len(self.tokens), len(ids))
        yield
        self.tokens += ids
        if self.states:
            self.states.end(len(self.tokens))

    def stepped(self, tokens: int) -> None:
        """The device alone ran steps, up to so many tokens: more than are held, where not all were read."""
        if self.states:
            self.states.at = tokens

    def untouched(self) -> AbstractContextManager[None]:
        """Steps inside leave everything behind the tokens held as it is."""
        return self.states.untouched() if self.states else nullcontext()

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, ctx, D] of a layer."""
        return self._keys[self._at[layer]], self._values[self._at[layer]]

    def scales(self, layer: int) -> Tensor | None:
        """Of keys and of values [2, kv_heads, ctx]; None where they are no int8."""
        return None if self._scales is None else self._scales[self._at[layer]]

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
        """Store k, v [T, kv_heads, D] at positions [T]; returns the first `bucket` positions of the layer."""
        keys, values = self.layer(layer)
        keys.index_copy_(1, positions, k.transpose(0, 1))
        values.index_copy_(1, positions, v.transpose(0, 1))
        return keys[:, :bucket], values[:, :bucket]

    def latents(self, layer: int) -> Tensor:
        """Of latent attention, [ctx, L + R] of a layer."""
        return self._keys[layer, 0]

    def write_latents(self, layer: int, rows: Tensor, positions: Tensor, bucket: int) -> Tensor:
        """Store rows [T, L + R] at positions [T]; returns the first `bucket` positions of the layer."""
        cache = self._keys[layer, 0]
        cache.index_copy_(0, positions, rows.to(cache.dtype))
        return cache[:bucket]

    def bucket(self, length: int) -> int:
        """Positions to read for a context of `length`: a multiple of BUCKET, at most all."""
        return min(self.ctx, -(-length // BUCKET) * BUCKET)

    def pretend(self, count: int) -> None:
        """For benchmarks: so many positions are taken, by whatever lies there."""
        self.tokens[:] = [0] * count

    def reuse(self, tokens: list[int]) -> int:
        """Keep the longest common prefix with `tokens` that can be gone on from; returns its length.

        The last of `tokens` is always run again: its logits are needed.
        """
        same = 0
        for old, new in zip(self.tokens, tokens[:-1], strict=False):
            if old != new:
                break
            same += 1
        if self.states:
            same = self.states.resume(same)
        del self.tokens[same:]
        return same


def zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeroed, for what is masked still enters a product; on the CPU pages are taken as the context grows."""
    if device.type == "cpu":
        return host_memory(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    return torch.zeros(shape, device=device, dtype=dtype)


def kv_nbytes(config: ModelConfig, ctx: int, itemsize: int, int8: bool = False) -> int:
    """Of keys and values of `ctx` positions."""
    if config.latent:
        return config.layers * ctx * config.latent.width * itemsize
    a_head = config.head_dim + 4 if int8 else config.head_dim * itemsize
    return 2 * len(config.attended) * config.kv_heads * ctx * a_head
