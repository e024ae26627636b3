"""Differences between model families; a family is one file in `families/`, named after its `model_type`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.rope import KINDS
from offmoe.mixers.base import Names
from offmoe.models import families
from offmoe.models.config import ModelConfig
from offmoe.models.names import GGUF_NAMES, HF_NAMES

ALWAYS = ("quantization_config", "rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
Values = Callable[[Tensor], Tensor]
Configured = Callable[[Mapping[str, Any], ModelConfig], ModelConfig]
Translated = Callable[[Mapping[str, Any]], dict[str, Any]]
GgufKeys = Callable[[ModelConfig], dict[str, Any]]
GgufFields = Callable[[Callable[[str], Any]], dict[str, Any]]


def unchanged(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Return `config`: attention heads and routed experts in every layer, no shared expert."""
    return config


def no_keys(config: ModelConfig) -> dict[str, Any]:
    """Raise OffmoeError where layers have a window: llama.cpp knows of windows in few architectures."""
    if any(config.windows):
        raise OffmoeError(
            f"{config.model_type} with a sliding_window of {max(config.windows)} cannot be packed: "
            "llama.cpp ignores it for this GGUF architecture, and its answers would differ"
        )
    return {}


@dataclass(frozen=True)
class Family:
    """One architecture: its names on disk, its rules, and the config values that are implemented."""

    model_type: str
    arch: str  # in a GGUF
    published: str  # a model that people run
    qk_norm: str  # see HeadsConfig
    renormalise: bool  # where neither a config.json nor a GGUF says
    defaults: Mapping[str, Any]  # fields that a config.json may leave out, as transformers' config class has them
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # shared field → its names here, own first
    outer: Mapping[str, Any] = field(
        default_factory=dict
    )  # fields that count next to a text_config, and their defaults
    priority: int = 0  # a GGUF is read by the family of highest priority among those that implement its gating
    names: Names = field(default_factory=lambda: HF_NAMES)
    gguf_names: Names = field(default_factory=lambda: GGUF_NAMES)
    interleaved: bool = False  # rotated pairs are neighbours in the rows of q and k, in every file
    interleaved_gguf: bool = False  # llama.cpp permutes the rows of q and k for this arch
    tiled_gguf: bool = False  # llama.cpp reorders the value heads of this arch, see mixers.deltanet.config.tile
    values: Mapping[str, Values] = field(default_factory=dict)  # role → weights in safetensors to effective weights
    translated: Translated = dict  # fields as this family has them → as all families share them
    configured: Configured = unchanged  # completes a config that has the fields of all families
    gguf_fields: GgufFields | None = None  # fields of config.json, out of GGUF keys that only this arch has
    gguf_keys: GgufKeys = no_keys  # GGUF keys that llama.cpp wants of this arch beyond those of all
    gguf_divided: bool = False  # without expert_feed_forward_length, the experts of a token share feed_forward_length
    gguf_rounded: bool = True  # yarn's bounds are rounded, of which a GGUF says nothing
    gguf_factors: bool = False  # llama.cpp reads models.rope.GGUF_FACTORS for this arch
    dense_first: bool = True  # a GGUF of this arch says how many dense layers come first, and has no others
    interleaved_experts: bool = False  # in safetensors, rows of stacked gate and up experts alternate
    transposed_experts: bool = False  # in safetensors, stacked experts of floats are [E, in, out]
    implemented: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # the first value is the default; (): any

    def __post_init__(self) -> None:
        everywhere = {
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False, None),
            "rope_type": KINDS,
            "layer_types": ("full_attention",),
            "scoring_func": ("softmax", None),
            "topk_method": ("greedy", None),
            "n_shared_experts": (0, None),
            "shared_expert_intermediate_size": (0, None),
            "first_k_dense_replace": (0, None),
            "routed_scaling_factor": (1.0, 0.0, None),
            "partial_rotary_factor": (1.0, None),
            "n_group": (1, 0, None),
            "kv_lora_rank": (None,),
            "expert_gating_func": (1, 0),
        }
        object.__setattr__(self, "implemented", {**everywhere, **self.implemented})

    def name(self, field: str) -> str:
        """Name in this family's config.json of a field that all families share."""
        return self.own.get(field, (field,))[0]

    def reads(self, field: str) -> bool:
        """Whether a field of its config.json means anything to this family."""
        return field in self.defaults or field in self.implemented or field in ALWAYS


@cache
def all_families() -> tuple[Family, ...]:
    """Every family in `families/`, by priority and then by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    found = [importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names]
    return tuple(sorted(found, key=lambda family: -family.priority))


def family_of(key: str, value: object, gate: object = None) -> Family:
    """The family whose `key` (model_type or arch) is `value`. Raises OffmoeError where there is none.

    Where several share an arch: the first that implements `gate`, the file's expert_gating_func.
    """
    names = (value, str(value).removesuffix("_text"))  # a model with vision, and its language model alone
    found = [family for family in all_families() if getattr(family, key) in names]
    if not found:
        known = ", ".join(sorted({str(getattr(family, key)) for family in all_families()}))
        raise OffmoeError(f"architecture {str(value)[:60]!r} is not supported; supported are {known}")
    return next((family for family in found if gate in family.implemented["expert_gating_func"]), found[0])
