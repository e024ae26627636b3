"""Keys and values of the tokens so far, in memory reserved at start; positions live on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from offmoe.machine.pinned_memory import host_memory
from offmoe.models.config import ModelConfig
from offmoe.trunk.recurrent_state import States

BUCKET = 256  # attention reads whole buckets, so that shapes change rarely and never with a host's decision
# Positions behind the window that its layers keep: a turn may leave out what the last answer thought, and steps are
# launched that nobody reads (the floor's, 14).
SLACK = 1024


class KVCache:
    """Static buffers of every layer [kv_heads, room, head_dim] and the ids that they hold; `states` of those without.

    Position p lies at p % room: a layer that looks at a window has room for little more than that, others for the
    whole context. In int8 each head's key or value has a float32 scale a position, [2, kv_heads, room]. Of latent
    attention (kernels.mla) one row a position is kept, [1, ctx, L + R]: the value is the front of the key.
    """

    def __init__(
        self, config: ModelConfig, ctx: int, device: torch.device, dtype: torch.dtype, int8: bool = False
    ) -> None:
        self.ctx = ctx
        self.tokens: list[int] = []  # whose keys and values are written
        self.states = States(config, device) if config.mixer else None
        self._states = {layer: index for index, layer in enumerate(config.recurrent)}
        self._written = 0  # positions before it may have been written over what a window's layers kept
        self._chunked = config.chunked
        self._windows = [config.window(layer) for layer in range(config.layers)]
        self._rooms = rooms(config, ctx)
        z = config.latent
        heads = [config.heads_of(layer) for layer in range(config.layers)]
        shapes = [(h.kv_heads, room, z.width if z else h.head_dim) for h, room in zip(heads, self._rooms, strict=True)]

        def reserved() -> list[Tensor]:
            return [zeros(shape, device, torch.int8 if int8 else dtype) for shape in shapes]

        self._keys = reserved()
        self._values = [keys[..., : z.kv_rank] for keys in self._keys] if z else reserved()
        self._scales = [zeros((2, *shape[:2]), device, torch.float32) for shape in shapes if int8]

    def state_of(self, layer: int) -> tuple[States, int]:
        """Of a layer without keys, and its number among these."""
        assert self.states, f"layer {layer} has keys and values"
        return self.states, self._states[layer]

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
        """Keys and values [kv_heads, room, D] of a layer."""
        return self._keys[layer], self._values[layer]

    def scales(self, layer: int) -> Tensor | None:
        """Of keys and of values [2, kv_heads, room]; None where they are no int8."""
        return self._scales[layer] if self._scales else None

    def open(self, layer: int, start: int, count: int) -> Chunk:
        """Where the keys and values of positions start … start + count are to be written, behind those that they see.

        `close` takes it once they are.
        """
        keys, values, scales, room = *self.layer(layer), self.scales(layer), self._rooms[layer]
        if room == self.ctx:
            return Chunk(keys, values, scales, 0)
        window = self._windows[layer]
        first = start // window * window if self._chunked else max(0, start - window + 1)
        before = torch.arange(first, start, device=keys.device) % room

        def staged(kept: Tensor) -> Tensor:
            room_for = kept.new_zeros((kept.shape[0], start - first + count, *kept.shape[2:]))
            room_for[:, : start - first] = kept[:, before]
            return room_for

        chunk_scales = None if scales is None else torch.stack([staged(scale) for scale in scales])
        return Chunk(staged(keys), staged(values), chunk_scales, first)

    def close(self, layer: int, chunk: Chunk, start: int, count: int) -> None:
        """Keep what was written into `chunk`, as far as there is room."""
        keys, values, room = *self.layer(layer), self._rooms[layer]
        if chunk.keys is keys:
            return
        kept = torch.arange(max(start, start + count - room), start + count, device=keys.device)
        places, sources = kept % room, kept - chunk.first
        keys[:, places], values[:, places] = chunk.keys[:, sources], chunk.values[:, sources]
        if chunk.scales is not None:
            self._scales[layer][:, :, places] = chunk.scales[:, :, sources]

    def latents(self, layer: int) -> Tensor:
        """Of latent attention, [ctx, L + R] of a layer."""
        return self._keys[layer][0]

    def write_latents(self, layer: int, rows: Tensor, positions: Tensor, bucket: int) -> Tensor:
        """Store rows [T, L + R] at positions [T]; returns the first `bucket` positions of the layer."""
        cache = self._keys[layer][0]
        cache.index_copy_(0, positions, rows.to(cache.dtype))
        return cache[:bucket]

    def bucket(self, length: int) -> int:
        """Positions to read for a context of `length`: a multiple of BUCKET, at most all."""
        return min(self.ctx, -(-length // BUCKET) * BUCKET)

    def wrote(self, positions: int) -> None:
        """Positions before this one have been written, perhaps by steps that nobody read."""
        self._written = max(self._written, positions)

    def pretend(self, count: int) -> None:
        """For benchmarks: so many positions are taken, by whatever lies there."""
        self.tokens[:] = [0] * count

    def reuse(self, tokens: list[int]) -> int:
        """Keep the longest common prefix with `tokens` that can be gone on from; returns its length.

        The last of `tokens` is always run again: its logits are needed. Where a layer no longer holds what the next
        token sees there, nothing is kept.
        """
        same = 0
        for old, new in zip(self.tokens, tokens[:-1], strict=False):
            if old != new:
                break
            same += 1
        self.wrote(len(self.tokens))
        if any(max(0, same - window + 1) < self._written - room for window, room in self._rings()):
            same = 0
        if self.states:
            same = self.states.resume(same)
        del self.tokens[same:]
        if not same:
            self._written = 0
        return same

    def _rings(self) -> set[tuple[int, int]]:
        """Window and room of the layers that do not hold the whole context."""
        return {(w, room) for w, room in zip(self._windows, self._rooms, strict=True) if 0 < room < self.ctx}


@dataclass(frozen=True)
class Chunk:
    """Keys and values [kv_heads, …, D] of positions `first` and on, and scales [2, kv_heads, …] of int8."""

    keys: Tensor
    values: Tensor
    scales: Tensor | None
    first: int


def rooms(config: ModelConfig, ctx: int) -> list[int]:
    """Positions that each layer keeps."""
    windows = map(config.window, range(config.layers))
    whole = [min(ctx, window + SLACK) if window else ctx for window in windows]
    return [0 if layer in config.recurrent else room for layer, room in enumerate(whole)]


def zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeroed, for what is masked still enters a product; on the CPU pages are taken as the context grows."""
    if device.type == "cpu" and 0 not in shape:
        return host_memory(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    return torch.zeros(shape, device=device, dtype=dtype)


def kv_nbytes(config: ModelConfig, ctx: int, itemsize: int, int8: bool = False) -> int:
    """Of keys and values of `ctx` positions."""
    if config.latent:
        return config.layers * ctx * config.latent.width * itemsize
    heads = (config.heads_of(layer) for layer in range(config.layers))
    position = [h.kv_heads * (h.head_dim + 4) if int8 else h.keys * itemsize for h in heads]
    return 2 * sum(room * nbytes for room, nbytes in zip(rooms(config, ctx), position, strict=True))
