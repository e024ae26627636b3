"""All mixers, and the modules of a mixer's package that run it."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from offmoe.mixers.base import MixerConfig, Names
from offmoe.mixers.deltanet.config import DeltaConfig
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.mixers.latent.config import LatentConfig
from offmoe.mixers.protocols import DeviceMixer, DeviceTensors, HostMixer, Tensors
from offmoe.mixers.shortconv.config import ShortConvConfig

CONFIGS: tuple[type[MixerConfig], ...] = (HeadsConfig, LatentConfig, DeltaConfig, ShortConvConfig)


def hf_names() -> Names:
    """Names in safetensors of all mixers' roles, unless a family has others."""
    return {role: names for config in CONFIGS for role, names in config.hf_names.items()}


def gguf_names() -> Names:
    return {role: names for config in CONFIGS for role, names in config.gguf_names.items()}


def float32_roles() -> frozenset[str]:
    """Matrices that `pack` leaves in float32."""
    return frozenset().union(*(config.float32_roles for config in CONFIGS))


def host_mixer(config: MixerConfig, tensors: Tensors) -> HostMixer:
    """Load a layer's mixer for the CPU."""
    return cast(HostMixer, import_module(f"offmoe.mixers.{config.package}.host").Host(config, tensors))


def device_mixer(config: MixerConfig, tensors: DeviceTensors) -> DeviceMixer:
    """Load a layer's mixer for a GPU; imports Triton."""
    return cast(DeviceMixer, import_module(f"offmoe.mixers.{config.package}.device").Device(config, tensors))
