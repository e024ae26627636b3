"""Numbers of a layer of latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offmoe.checkpoint.fields import count
from offmoe.kernels.mla import HEADS_AT_ONCE, Latent
from offmoe.kernels.striped import stripe
from offmoe.mixers.base import GgufRows, MixerConfig, Names
from offmoe.mixers.heads.config import ATTENTION, HeadsConfig
from offmoe.mixers.latent.cache import LatentCache
from offmoe.mixers.latent.rows import latent_rows, query_rows
from offmoe.mixers.rope import RopeConfig, check_heads, check_rotary

HF_NAMES: Names = {
    "q_a": (ATTENTION + "q_a_proj.weight",),
    "q_a_norm": (ATTENTION + "q_a_layernorm.weight",),
    "q_b": (ATTENTION + "q_b_proj.weight",),
    "kv_a": (ATTENTION + "kv_a_proj_with_mqa.weight",),
    "kv_a_norm": (ATTENTION + "kv_a_layernorm.weight",),
    "kv_b": (ATTENTION + "kv_b_proj.weight",),
}
GGUF_NAMES: Names = {
    "q_a": ("blk.{l}.attn_q_a.weight",),
    "q_a_norm": ("blk.{l}.attn_q_a_norm.weight",),
    "q_b": ("blk.{l}.attn_q_b.weight",),
    "kv_a": ("blk.{l}.attn_kv_a_mqa.weight",),
    "kv_a_norm": ("blk.{l}.attn_kv_a_norm.weight",),
    "kv_b": ("blk.{l}.attn_kv_b.weight",),  # of older files; later ones have its two halves, the keys' transposed
    "k_b": ("blk.{l}.attn_k_b.weight",),
    "v_b": ("blk.{l}.attn_v_b.weight",),
}


@dataclass(frozen=True)
class LatentConfig(MixerConfig):
    """Query heads over one cached latent a position."""

    package: ClassVar[str] = "latent"
    label: ClassVar[str] = "latent attention"
    hf_names: ClassVar[Names] = HF_NAMES
    gguf_names: ClassVar[Names] = GGUF_NAMES
    int8_cache: ClassVar[bool] = False
    out_proj: ClassVar[str] = "o"

    heads: int
    latent: Latent
    rope: RopeConfig
    scale: float = 0.0  # of q · k; 0: 1 / √(N + R)

    @classmethod
    def from_fields(cls, raw: Mapping[str, Any], heads: HeadsConfig) -> LatentConfig:
        """Fields of DeepSeek-V2's config.json, which other families took over; `heads` has those of all families."""
        assert heads.rope, "every family with latent attention has positions"
        latent = Latent(
            q_rank=count(raw, "q_lora_rank", default=0),
            kv_rank=count(raw, "kv_lora_rank"),
            qk_nope=count(raw, "qk_nope_head_dim"),
            qk_rope=count(raw, "qk_rope_head_dim"),
            value=count(raw, "v_head_dim"),
        )
        return cls(heads.heads, latent, RopeConfig(latent.qk_rope, heads.rope.theta, heads.rope.scaling))

    @property
    def score_scale(self) -> float:
        """Factor of q · k."""
        return float((self.scale or self.latent.key**-0.5) * self.rope.scaling.scores)

    @property
    def in_proj(self) -> tuple[str, ...]:
        return ("q_a" if self.latent.q_rank else "q", "kv_a")

    @property
    def projected(self) -> int:
        return (self.latent.q_rank or self.heads * self.latent.key) + self.latent.width

    @property
    def mixed(self) -> int:
        return self.heads * self.latent.value

    @property
    def heads_of_attention(self) -> int:
        return self.heads

    @property
    def position(self) -> RopeConfig | None:
        return self.rope

    @property
    def cached(self) -> tuple[str, str]:
        return f"a latent of {self.latent.width}", "values per position"

    def check(self) -> None:
        check_heads(self.heads, 1, self.latent.key)
        check_rotary(self.rope, self.latent.key)

    def shapes(self, hidden: int, split: bool = False) -> dict[str, tuple[int, ...]]:
        z, heads = self.latent, self.heads
        shapes: dict[str, tuple[int, ...]] = {
            "o": (hidden, self.mixed),
            "kv_a": (z.width, hidden),
            "kv_a_norm": (z.kv_rank,),
        }
        if z.q_rank:
            shapes |= {"q_a": (z.q_rank, hidden), "q_a_norm": (z.q_rank,), "q_b": (heads * z.key, z.q_rank)}
        else:
            shapes["q"] = (heads * z.key, hidden)
        if split:
            return shapes | {"k_b": (heads, z.kv_rank, z.qk_nope), "v_b": (heads, z.value, z.kv_rank)}
        return shapes | {"kv_b": (heads * (z.qk_nope + z.value), z.kv_rank)}

    def row_order(self, role: str, interleaved: bool, striped: bool = False) -> Tensor | None:
        """The latents of queries are striped too: the decode step multiplies them next."""
        if role == "q_a":
            return stripe(torch.arange(self.latent.q_rank)) if striped else None
        if role in ("q", "q_b"):
            return query_rows(self.heads, self.latent, striped)
        return latent_rows(self.latent) if role == "kv_a" else None

    def cache(self, ctx: int, device: torch.device, dtype: torch.dtype, int8: bool) -> LatentCache:
        return LatentCache(self.latent.width, ctx, device, dtype)

    def cache_nbytes(self, ctx: int, itemsize: int, int8: bool) -> int:
        return ctx * self.latent.width * itemsize

    @property
    def activations(self) -> int:
        return 4 * self.widest[0]

    @property
    def widest(self) -> tuple[int, int]:
        queries = self.heads * self.latent.key
        return self.projected + 2 * queries, queries

    def chunk_nbytes(self, ctx: int, itemsize: int) -> int:
        """Keys and values of some heads, expanded and padded."""
        return min(self.heads, HEADS_AT_ONCE) * ctx * 4 * max(self.latent.key, self.latent.value) * itemsize

    def gguf_keys(self) -> dict[str, Any]:
        """key_length and value_length are those of the cache: one key-value head, whose value is its key's front."""
        z = self.latent
        return {
            "attention.head_count": self.heads,
            "attention.head_count_kv": 1,
            "attention.key_length": z.width,
            "attention.value_length": z.kv_rank,
            "attention.key_length_mla": z.key,
            "attention.value_length_mla": z.value,
            "attention.kv_lora_rank": z.kv_rank,
            "rope.dimension_count": z.qk_rope,
            "rope.freq_base": self.rope.theta,
            **({"attention.q_lora_rank": z.q_rank} if z.q_rank else {}),
        }

    def gguf_rows(self, role: str) -> list[GgufRows] | None:
        """k_b and v_b are the keys' and the values' rows of kv_b, head by head; those of the keys transposed."""
        if role not in ("k_b", "v_b"):
            return None
        z = self.latent
        first, count = (0, z.qk_nope) if role == "k_b" else (z.qk_nope, z.value)
        each = z.qk_nope + z.value
        return [GgufRows("kv_b", head * each + first, count, role == "k_b") for head in range(self.heads)]
