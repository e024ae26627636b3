"""Numbers of a layer of attention heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offmoe.kernels.rope import AttentionTemperature
from offmoe.mixers.base import MixerConfig, Names
from offmoe.mixers.heads.cache import HeadCache, room
from offmoe.mixers.rope import RopeConfig, check_heads, check_rotary

ATTENTION = "model.layers.{l}.self_attn."
ROLES = ("q", "k", "v", "o")
HF_NAMES: Names = {
    **{role: (f"{ATTENTION}{role}_proj.weight",) for role in ROLES},
    **{f"{role}_bias": (f"{ATTENTION}{role}_proj.bias",) for role in ROLES},
    "q_norm": (ATTENTION + "q_norm.weight",),
    "k_norm": (ATTENTION + "k_norm.weight",),
    "sinks": (ATTENTION + "sinks",),
}
GGUF_NAMES: Names = {
    **{role: (f"blk.{{l}}.attn_{role}.weight",) for role in "qkv"},
    **{f"{role}_bias": (f"blk.{{l}}.attn_{role}.bias",) for role in "qkv"},
    "o": ("blk.{l}.attn_output.weight",),
    "o_bias": ("blk.{l}.attn_output.bias",),
    "q_norm": ("blk.{l}.attn_q_norm.weight",),
    "k_norm": ("blk.{l}.attn_k_norm.weight",),
    "sinks": ("blk.{l}.attn_sinks.weight",),
}


@dataclass(frozen=True)
class HeadsConfig(MixerConfig):
    """Grouped-query attention, and what families add to it."""

    package: ClassVar[str] = "heads"
    label: ClassVar[str] = "attention"
    hf_names: ClassVar[Names] = HF_NAMES
    gguf_names: ClassVar[Names] = GGUF_NAMES
    out_proj: ClassVar[str] = "o"

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig | None  # None: the layer has no positions (NoPE)
    eps: float  # of the norms of q, k and v
    scale: float = 0.0  # of q · k; 0: 1 / √D
    window: int = 0  # positions that a token sees, its own included; 0: all before it
    chunked: bool = False  # the window is a chunk: a token sees its own, from the chunk's first position on
    qk_norm: str = "none"  # head (each head), full (all together), after (each rotated head), unit (after, by ones)
    value_norm: bool = False  # each head's value is divided by its RMS
    qkv_bias: bool = False
    o_bias: bool = False
    gated: bool = False  # mixed values are multiplied with the sigmoid of q_gate, whose rows are in q's tensor
    sinks: bool = False  # a logit a head that takes its share of attention and gives nothing
    clip: float | None = None  # q, k and v are clamped to ± clip
    temperature: AttentionTemperature | None = None  # of the queries, where the layer has no positions

    @property
    def queries(self) -> int:
        """Q, values of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """K, values of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def gate_rows(self) -> int:
        """Rows of q_gate, which come first in `projected`."""
        return self.queries if self.gated else 0

    @property
    def norm_after(self) -> bool:
        """Whether q and k are normed after they are rotated."""
        return self.qk_norm in ("after", "unit")

    @property
    def normed_by_weights(self) -> bool:
        return self.qk_norm not in ("none", "unit")

    @property
    def score_scale(self) -> float:
        """Factor of q · k."""
        return float((self.scale or self.head_dim**-0.5) * (self.rope.scaling.scores if self.rope else 1.0))

    @property
    def in_proj(self) -> tuple[str, ...]:
        return ("q_gate", "q", "k", "v") if self.gated else ("q", "k", "v")

    @property
    def in_bias(self) -> tuple[str, ...]:
        return ("q_bias", "k_bias", "v_bias") if self.qkv_bias else ()

    @property
    def out_bias(self) -> str | None:
        return "o_bias" if self.o_bias else None

    @property
    def projected(self) -> int:
        return self.gate_rows + self.queries + 2 * self.keys

    @property
    def mixed(self) -> int:
        return self.queries

    @property
    def heads_of_attention(self) -> int:
        return self.heads

    @property
    def position(self) -> RopeConfig | None:
        return self.rope

    @property
    def sees(self) -> int:
        return self.window

    @property
    def cached(self) -> tuple[str, str]:
        return str(self.kv_heads), "key-value heads"

    def check(self) -> None:
        check_heads(self.heads, self.kv_heads, self.head_dim)
        if self.rope:
            check_rotary(self.rope, self.head_dim)

    def shapes(self, hidden: int, split: bool = False) -> dict[str, tuple[int, ...]]:
        q, kv = self.queries, self.keys
        shapes: dict[str, tuple[int, ...]] = {
            "o": (hidden, q),
            "q": (q + self.gate_rows, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
        }
        if self.normed_by_weights:
            wide = (q, kv) if self.qk_norm == "full" else (self.head_dim, self.head_dim)
            shapes |= {"q_norm": wide[:1], "k_norm": wide[1:]}
        if self.qkv_bias:
            shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
        if self.o_bias:
            shapes["o_bias"] = (hidden,)
        if self.sinks:
            shapes["sinks"] = (self.heads,)
        return shapes

    @property
    def held(self) -> Mapping[str, str]:
        return {"q": "q", "q_gate": "q"} if self.gated else {}

    def held_rows(self, role: str) -> Tensor:
        """A head's query, then its gate."""
        rows = torch.arange(2 * self.queries).view(self.heads, 2, -1)
        return rows[:, int(role == "q_gate")].flatten()

    def row_order(self, role: str, interleaved: bool, striped: bool = False) -> Tensor | None:
        if not interleaved or role not in ("q", "k"):
            return None
        heads = self.heads if role == "q" else self.kv_heads
        return torch.arange(heads * self.head_dim).unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten()

    def cache(self, ctx: int, device: torch.device, dtype: torch.dtype, int8: bool) -> HeadCache:
        shape = (self.kv_heads, room(self.window, ctx), self.head_dim)
        return HeadCache(shape, ctx, device, dtype, int8, window=self.window, chunked=self.chunked)

    def cache_nbytes(self, ctx: int, itemsize: int, int8: bool) -> int:
        position = self.kv_heads * (self.head_dim + 4) if int8 else self.keys * itemsize
        return 2 * room(self.window, ctx) * position

    @property
    def activations(self) -> int:
        return 4 * self.projected

    @property
    def staged(self) -> int:
        return 4 * self.keys if self.window else 0

    def gguf_keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
        }
        if self.rope:
            keys |= {"rope.dimension_count": self.rope.rotary, "rope.freq_base": self.rope.theta}
        return keys

    def gguf_order(self, role: str, interleaved: bool, tiled: bool) -> Callable[[Tensor], Tensor] | None:
        heads = {"q": self.heads, "k": self.kv_heads}.get(role) if interleaved else None
        return (lambda weight: interleave_rope_rows(weight, heads)) if heads else None


def interleave_rope_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads · D, H] with rotated pairs in halves (NEOX) → rows with the pairs as neighbours (llama.cpp)."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
