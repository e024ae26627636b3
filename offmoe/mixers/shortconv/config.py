"""Numbers of a layer of gated short convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from offmoe.checkpoint.fields import count
from offmoe.errors import OffmoeError
from offmoe.kernels.shortconv import ShortConv
from offmoe.mixers.base import Names
from offmoe.mixers.recurrent import RecurrentConfig

CONV = "model.layers.{l}.conv."
HF_NAMES: Names = {
    "conv_in": (CONV + "in_proj.weight",),
    "conv_taps": (CONV + "conv.weight",),
    "conv_o": (CONV + "out_proj.weight",),
}
GGUF_NAMES: Names = {
    "conv_in": ("blk.{l}.shortconv.in_proj.weight",),
    "conv_taps": ("blk.{l}.shortconv.conv.weight",),
    "conv_o": ("blk.{l}.shortconv.out_proj.weight",),
}


@dataclass(frozen=True)
class ShortConvConfig(RecurrentConfig):
    """A convolution over each channel's last inputs, with a gate before it and one behind it."""

    package: ClassVar[str] = "shortconv"
    label: ClassVar[str] = "convolution"
    hf_names: ClassVar[Names] = HF_NAMES
    gguf_names: ClassVar[Names] = GGUF_NAMES
    float32_roles: ClassVar[frozenset[str]] = frozenset(("conv_taps",))
    out_proj: ClassVar[str] = "conv_o"

    conv: ShortConv

    @classmethod
    def from_fields(cls, raw: Mapping[str, Any]) -> ShortConvConfig:
        """Fields of LFM2's config.json."""
        conv = ShortConv(count(raw, "hidden_size"), count(raw, "conv_L_cache", default=3))
        if conv.taps < 2:
            raise OffmoeError(f"conv_L_cache is {conv.taps}: expected at least 2")
        return cls(conv)

    @property
    def state_shape(self) -> ShortConv:
        return self.conv

    @property
    def in_proj(self) -> tuple[str, ...]:
        return ("conv_in",)

    def shapes(self, hidden: int, split: bool = False) -> dict[str, tuple[int, ...]]:
        return {
            "conv_in": (self.projected, hidden),
            "conv_taps": (self.conv.channels, self.conv.taps),
            "conv_o": (hidden, self.conv.values),
        }

    def gguf_keys(self) -> dict[str, Any]:
        return {"shortconv.l_cache": self.conv.taps}
