"""The `quantization_config` of a config.json: how a model's files pack matrices, a function a `quant_method`.

How activations were to be quantised is not looked at: we compute with them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from offmoe.checkpoint import Checkpoint
from offmoe.checkpoint.base import shown
from offmoe.checkpoint.int4 import Packing, Parts, check_small
from offmoe.checkpoint.safetensors import unsupported
from offmoe.errors import OffmoeError

Table = Mapping[str, Any]


def packing_of(config: object) -> Packing | None:
    """None: there is no config, or it is not of codes of 4 bits in groups. Raises OffmoeError, by field and value."""
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    return METHODS[method](config) if isinstance(config, Mapping) and method in METHODS else None


def assemble(checkpoint: Checkpoint, config: object) -> None:
    """Puts matrices that are several tensors into `checkpoint.tensors`, in place of these.

    Zero points and columns' groups, where the config says that they say nothing, are looked at here for all but the
    experts behind a layer's first: these 18,000 small reads of a large model are made as its records are.
    """
    packing = packing_of(config)
    parts = Parts(checkpoint, packing) if packing else None
    found = list(parts.matrices()) if parts else []
    used = parts.used if parts else set()
    for name, info in checkpoint.parts.items():
        if name not in used:
            raise unsupported(checkpoint.path, name, info.format)
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in used}
    checkpoint.tensors = {**kept, **{info.name: info for info in found}}
    checkpoint.parts = {}
    for info in found:
        _, _, expert = info.name.partition(".experts.")
        if not expert or expert.startswith("0."):
            check_small(checkpoint, info)


def awq(config: Table) -> Packing:
    """AutoAWQ's, and llm-compressor's of that name."""
    demand(config, "awq", bits=(4,), zero_point=(True,), version=("gemm", "GEMM", None), format=("gemm", None))
    return Packing("awq", group_size(config, "awq"), zeros=True)


def gptq(config: Table) -> Packing:
    """AutoGPTQ's and GPTQModel's; the first format has zero points one too small."""
    demand(config, "gptq", bits=(4,), desc_act=(False, None), sym=(True, False), pack_dtype=("int32", None),
           checkpoint_format=("gptq", "gptq_v2", None), format=("gptq", "gptq_v2", None),
           is_marlin_format=(False, None))  # fmt: skip
    others = [name for name in config.get("dynamic") or {} if not str(name).startswith("-:")]  # those leave modules out
    if others:
        raise refused("gptq", "dynamic", others[0], "one way for all modules")
    first = "gptq_v2" not in (config.get("checkpoint_format"), config.get("format"))
    return Packing("gptq", group_size(config, "gptq"), zeros=not config["sym"], plus=int(first))


def pack_quantized(config: Table) -> Packing:
    """compressed-tensors' format of that name."""
    method = "compressed-tensors"
    demand(config, method, format=("pack-quantized",), sparsity_config=(None, {}), transform_config=(None, {}))
    groups = config.get("config_groups")
    schemes = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    if not schemes or not isinstance(schemes[0], Mapping) or any(scheme != schemes[0] for scheme in schemes):
        raise refused(method, "config_groups", groups, "the same weights in all groups")
    weights: Table = schemes[0]
    demand(weights, method, num_bits=(4,), type=("int", None), symmetric=(True, False, None), dynamic=(False, None),
           strategy=("group", "channel"), actorder=(None, False, "weight", "static"))  # fmt: skip
    group = -1 if weights["strategy"] == "channel" else group_size(weights, method)
    return Packing(method, group, zeros=weights.get("symmetric") is False)


METHODS: dict[object, Callable[[Table], Packing]] = {
    "awq": awq, "gptq": gptq, "compressed-tensors": pack_quantized,
}  # fmt: skip


def demand(config: Table, method: str, **allowed: tuple[object, ...]) -> None:
    """Every field has one of the values; None: it may be left out."""
    for field, values in allowed.items():
        if not any(config.get(field) is value or config.get(field) == value for value in values):
            raise refused(method, field, config.get(field), " or ".join(repr(value) for value in values))


def group_size(config: Table, method: str) -> int:
    size = config.get("group_size")
    if type(size) is not int or (size != -1 and size < 1):
        raise refused(method, "group_size", size, "-1 or a number above 0")
    return size


def refused(method: str, field: str, value: object, implemented: str) -> OffmoeError:
    return OffmoeError(
        f"quantization_config of {method}: {field} is {shown(value)}, and offmoe implements {implemented}: "
        "this model cannot be run yet"
    )
