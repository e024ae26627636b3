"""Interface of mixers: the part of a layer in which a token takes up information from the tokens before it.

Every layer frames its mixer with one matrix in front of it and one behind it, which are the trunk's:

    x [T, H] → norm → in_proj → projected [T, P] → mixer → mixed [T, M] → out_proj → [T, H], added to x

A package of this folder has three modules (and more where it needs them):

    config.py   a `MixerConfig`: numbers of one layer, its tensors by role, sizes of its cache, keys in a GGUF
    host.py     `Host`, a `protocols.HostMixer`: weights and forward pass in plain torch
    device.py   `Device`, a `protocols.DeviceMixer`: weights, a prompt's forward pass, a decode step's launches (Triton)

and one line in `mixers.registry.CONFIGS`. tests/mixers/test_contract.py runs the same checks on every mixer.

Letters in shapes, here and in the trunk: T tokens, H hidden size, P rows of in_proj, M columns of out_proj,
D head_dim, Q = heads · D, K = kv_heads · D, S positions in a cache, V vocabulary, E experts, F inner size of an expert,
k experts of a token. In latent attention (kernels.mla): L kv_rank, N qk_nope, R qk_rope, V a head's value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offmoe.mixers.rope import RopeConfig

Names = Mapping[str, tuple[str, ...]]  # role → templates over layer {l} and expert {e}; the first that exists counts


@dataclass(frozen=True)
class GgufRows:
    """Rows `first` to `first + count` of the tensor that plays `role` in safetensors, as a GGUF has them."""

    role: str
    first: int
    count: int
    transposed: bool


@dataclass(frozen=True)
class MixerConfig:
    """Numbers of one layer's mixer, and what follows from them for files, memory and the plan."""

    package: ClassVar[str]  # folder in offmoe/mixers
    label: ClassVar[str]  # for people: "DeltaNet"
    hf_names: ClassVar[Names]  # of its roles in safetensors, unless a family has others
    gguf_names: ClassVar[Names]
    float32_roles: ClassVar[frozenset[str]] = frozenset()  # matrices that `pack` leaves in float32
    int8_cache: ClassVar[bool] = True  # --kv int8 is implemented
    out_proj: ClassVar[str]  # role of [H, M]

    @property
    def in_proj(self) -> tuple[str, ...]:
        """Roles whose rows, one matrix after another, make `projected` out of a layer's normed input."""
        raise NotImplementedError

    @property
    def in_bias(self) -> tuple[str, ...]:
        """Roles of the biases of in_proj, one after another; empty: none."""
        return ()

    @property
    def out_bias(self) -> str | None:
        return None

    @property
    def projected(self) -> int:
        """P, rows of in_proj."""
        raise NotImplementedError

    @property
    def mixed(self) -> int:
        """M, columns of out_proj."""
        raise NotImplementedError

    @property
    def heads_of_attention(self) -> int:
        """Query heads; 0 where the mixer is no attention."""
        return 0

    @property
    def position(self) -> RopeConfig | None:
        """Rotary embedding, where the layer has one."""
        return None

    @property
    def sees(self) -> int:
        """Positions that a token sees, its own included; 0: all before it."""
        return 0

    @property
    def cached(self) -> tuple[str, str]:
        """Contents of the cache, for people: an amount and its unit."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise OffmoeError where the numbers contradict one another."""

    # Tensors

    def shapes(self, hidden: int, split: bool = False) -> dict[str, tuple[int, ...]]:
        """Role → shape of each tensor in a file. split: latent attention's kv_b is stored in two halves."""
        raise NotImplementedError

    @property
    def held(self) -> Mapping[str, str]:
        """Role → role of the tensor that holds its rows together with others, where it has no tensor of its own."""
        return {}

    def held_shape(self, holder: str, hidden: int) -> tuple[int, ...]:
        """Shape of a tensor that holds several roles."""
        return self.shapes(hidden)[holder]

    def held_rows(self, role: str) -> Tensor:
        """Indices of the rows of `role`, in the order in which they are computed with, in the tensor that holds it."""
        raise NotImplementedError

    def row_order(self, role: str, interleaved: bool, striped: bool = False) -> Tensor | None:
        """Indices that bring a file's rows into the order in which they are computed with; None: they are in it.

        interleaved: rotated pairs are neighbours in the rows of q and k. striped: for the decode step
        (kernels.striped).
        """
        return None

    # Memory

    def cache(self, ctx: int, device: torch.device, dtype: torch.dtype, int8: bool) -> Any:
        """Cache of one layer for `ctx` positions."""
        raise NotImplementedError

    def cache_nbytes(self, ctx: int, itemsize: int, int8: bool) -> int:
        return 0

    @property
    def state_nbytes(self) -> int:
        """Bytes of a recurrent layer's state."""
        return 0

    @property
    def activations(self) -> int:
        """Values a token that a prompt's chunk holds at once on a GPU."""
        raise NotImplementedError

    @property
    def staged(self) -> int:
        """Values a token that a chunk stages before they go into a ring."""
        return 0

    @property
    def widest(self) -> tuple[int, int]:
        """Upper bounds for rows and columns of the matrices that a chunk unpacks."""
        return self.projected, self.mixed

    def chunk_nbytes(self, ctx: int, itemsize: int) -> int:
        """Bytes that a chunk takes on a GPU however few tokens it has."""
        return 0

    # GGUF

    def gguf_keys(self) -> dict[str, Any]:
        """Keys of a GGUF, without its architecture's name in front."""
        return {}

    def gguf_order(self, role: str, interleaved: bool, tiled: bool) -> Callable[[Tensor], Tensor] | None:
        """Function that brings the rows of `role` into a GGUF's order; None: they are in it.

        interleaved, tiled: llama.cpp permutes q and k, or the value heads of DeltaNet, for this architecture.
        """
        return None

    def gguf_rows(self, role: str) -> list[GgufRows] | None:
        """Where the rows of a GGUF's tensor are in safetensors, if they are parts of another role's tensor."""
        return None
