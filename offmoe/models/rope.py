"""Read rotary embedding and its scaling from `config.json` (in both its layouts) or from the keys of a GGUF."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.checkpoint.fields import count, flag, number, numbers
from offmoe.errors import OffmoeError
from offmoe.kernels.rope import PLAIN, PROPORTIONAL, Scaling, yarn_mscale

OLD_NAMES = {None: "default", "none": "default", "su": "longrope"}
GGUF_FACTORS = "rope_freqs.weight"  # a tensor: divisors of the pairs' frequencies
GGUF_LONG = ("rope_factors_long.weight", "rope_factors_short.weight")
YARN_KEYS = {
    "scaling.original_context_length": "original_max_position_embeddings",
    "scaling.yarn_beta_fast": "beta_fast",
    "scaling.yarn_beta_slow": "beta_slow",
}
SCALING_KEYS = ("scaling.type", "scaling.factor", "scaling.attn_factor", "scaling.yarn_log_multiplier", "scale_linear",
                *YARN_KEYS)  # of a GGUF, without `rope.`; scale_linear is the factor in old files  # fmt: skip
FACTORED = ("llama3", PROPORTIONAL)  # kinds that a GGUF gives by GGUF_FACTORS


def rope_parameters(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields of the rotary embedding, `rope_type` among them.

    transformers 5 nests what older configs keep at the top level and in `rope_scaling`, which counts where both are.
    """
    nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(nested, Mapping):
        raise OffmoeError("rope_parameters or rope_scaling in the model's config is no table")
    rope = {**{name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")}, **nested}
    kind = rope.get("rope_type", rope.get("type"))
    rope["rope_type"] = OLD_NAMES.get(kind, kind) if isinstance(kind, str | None) else kind
    return rope


def scaling_of(raw: Mapping[str, Any]) -> Scaling:
    """Scaling of the config. Raises OffmoeError where numbers are missing."""
    rope = rope_parameters(raw)
    kind, trained = rope["rope_type"], count(raw, "max_position_embeddings")
    if kind == "default":
        return PLAIN
    original = count({**raw, **rope}, "original_max_position_embeddings", default=trained)
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
        return Scaling(kind, factor, original, fast=number(rope, "high_freq_factor"),
                       slow=number(rope, "low_freq_factor"))  # fmt: skip
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
    trained = count(raw, "max_position_embeddings")
    return max(trained, int(scaling.factor * scaling.original)) if scaling.kind in ("yarn", "dynamic") else trained


def gguf_scaling(
    key: Callable[[str], Any], tensors: Mapping[str, Any], factors: list[float] | None = None, rounded: bool = True
) -> dict[str, Any]:
    """The table `rope_scaling` of a config, from `{arch}.rope.scaling.*` and the values of GGUF_FACTORS.

    llama.cpp scales linearly where no type is given, multiplies yarn's own factor of cos and sin by `attn_factor`, and
    keeps a tenth of mscale_all_dim. rounded: yarn's bounds are.
    """
    if long := [name for name in GGUF_LONG if name in tensors]:
        raise OffmoeError(f"tensor {long[0]} scales the rotation, which offmoe reads from a config.json only")
    given = {name: value for name in SCALING_KEYS if (value := key(f"rope.{name}")) is not None}
    kind = given.get("scaling.type", "linear")
    grown = number(given, "scaling.attn_factor", 1.0)
    factor = number(given, "scaling.factor", number(given, "scale_linear", 0.0)) or 1.0
    if kind == "yarn" and factors is None:
        found = {"rope_type": kind, "factor": factor, "truncate": rounded} | {
            ours: given[theirs] for theirs, ours in YARN_KEYS.items() if theirs in given
        }
        if "scaling.attn_factor" in given:
            found["attention_factor"] = grown * yarn_mscale(factor)
        if multiplier := number(given, "scaling.yarn_log_multiplier", 0.0):
            found["mscale"] = found["mscale_all_dim"] = 10 * multiplier
        return found
    if kind not in ("none", "linear", "longrope"):
        raise OffmoeError(
            f"rope.scaling.type is {quote(kind)}{' beside ' + GGUF_FACTORS if factors else ''}, and offmoe implements "
            "none, linear and yarn: this model cannot be run yet"
        )
    if grown != 1:
        raise OffmoeError(
            f"rope.scaling.attn_factor is {grown:g} without yarn, and offmoe implements 1: this model cannot be run yet"
        )
    factor = 1.0 if kind == "none" else factor
    if factors is not None:
        each = [factor * one for one in factors]
        return {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0,
                "short_factor": each, "long_factor": each}  # fmt: skip
    return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
