"""Read rotary embedding and its scaling from `config.json` (in both its layouts) or from the keys of a GGUF."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from offmoe.checkpoint.fields import count, flag, number, numbers
from offmoe.errors import OffmoeError
from offmoe.kernels.rope import PLAIN, PROPORTIONAL, Scaling, yarn_mscale

OLD_NAMES = {None: "default", "none": "default", "su": "longrope"}
GGUF_FACTORS = "rope_freqs.weight"  # a tensor: divisors of the pairs' frequencies
GGUF_LONG = ("rope_factors_long.weight", "rope_factors_short.weight")
FACTORED = ("llama3", PROPORTIONAL)  # kinds that a GGUF gives by GGUF_FACTORS


def rope_parameters(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields of the rotary embedding, `rope_type` among them.

    transformers 5 nests what older configs keep at the top level and in `rope_scaling`.
    """
    nested = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(nested, Mapping) or not isinstance(scaling, Mapping):
        raise OffmoeError("rope_parameters or rope_scaling in the model's config is no table")
    rope = {**{name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")}, **scaling, **nested}
    kind = rope.get("rope_type", rope.get("type"))
    rope["rope_type"] = OLD_NAMES.get(kind, kind) if isinstance(kind, str | None) else kind
    return rope


def scaling_of(raw: Mapping[str, Any]) -> Scaling:
    """Scaling of the config. Raises OffmoeError where numbers are missing."""
    rope = rope_parameters(raw)
    kind, trained = rope["rope_type"], count(raw, "max_position_embeddings", default=4096)
    if kind == "default":
        return PLAIN
    original = count(raw, "original_max_position_embeddings", default=0) or count(
        rope, "original_max_position_embeddings", default=trained
    )
    factor = number(rope, "factor", 0.0)
    if not factor and kind in ("yarn", "longrope"):  # follows from the lengths
        factor = trained / original
    if not factor:
        raise OffmoeError(f"rope_type {kind} has no factor: expected by how much it lengthens the context")
    if kind == "yarn":
        return yarn(rope, factor, original)
    if kind == "longrope":
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        return Scaling(kind, factor, original, number(rope, "attention_factor", 0.0) or grown,
                       short=numbers(rope, "short_factor"), long=numbers(rope, "long_factor"))  # fmt: skip
    if kind == "llama3":
        return Scaling(kind, factor, original, fast=number(rope, "high_freq_factor", 4.0),
                       slow=number(rope, "low_freq_factor", 1.0))  # fmt: skip
    return Scaling(kind, factor, trained)


def yarn(rope: Mapping[str, Any], factor: float, original: int) -> Scaling:
    """YaRN, with DeepSeek's two mscales (arXiv 2405.04434).

    cos and sin are multiplied by the quotient of the two, scores by the square of the second.
    """
    mscale, all_dim = number(rope, "mscale", 0.0), number(rope, "mscale_all_dim", 0.0)
    grown = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else yarn_mscale(factor)
    return Scaling(
        "yarn", factor, original,
        attention=number(rope, "attention_factor", 0.0) or grown,
        scores=yarn_mscale(factor, all_dim) ** 2 if all_dim else 1.0,
        fast=number(rope, "beta_fast", 0.0) or 32.0, slow=number(rope, "beta_slow", 0.0) or 1.0,
        truncate=flag(rope, "truncate", True),
    )  # fmt: skip


def positions(raw: Mapping[str, Any], scaling: Scaling) -> int:
    """Positions that a model supports; configs with yarn or dynamic may give those trained without scaling."""
    trained = count(raw, "max_position_embeddings", default=4096)
    return max(trained, int(scaling.factor * scaling.original)) if scaling.kind in ("yarn", "dynamic") else trained


def gguf_scaling(
    key: Callable[[str], Any], tensors: Mapping[str, Any], factors: list[float] | None = None
) -> dict[str, Any]:
    """The table `rope_scaling` of a config, from `{arch}.rope.scaling.*` or from the values of GGUF_FACTORS.

    llama.cpp multiplies yarn's own factor of cos and sin by `attn_factor`, and keeps a tenth of mscale_all_dim.
    """
    if long := [name for name in GGUF_LONG if name in tensors]:
        raise OffmoeError(f"tensor {long[0]} scales the rotation, which offmoe reads from a config.json only")
    if factors is not None:
        return {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0,
                "short_factor": factors, "long_factor": factors}  # fmt: skip
    names = {
        "rope_type": "type",
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    found = {ours: key(f"rope.scaling.{theirs}") for ours, theirs in names.items()}
    given = {"attn_factor": key("rope.scaling.attn_factor"), "log": key("rope.scaling.yarn_log_multiplier")}
    if given["attn_factor"] is not None:
        grown = yarn_mscale(number(found, "factor", 1.0)) if found["rope_type"] == "yarn" else 1.0
        found["attention_factor"] = number(given, "attn_factor", 1.0) * grown
    if multiplier := number(given, "log", 0.0):
        found["mscale"] = found["mscale_all_dim"] = 10 * multiplier
    return {name: value for name, value in found.items() if value is not None}
