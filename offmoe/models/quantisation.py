"""Read the `quantization_config` of a config.json: how files pack matrices. One function for each `quant_method`.

Schemes for activations are ignored: offmoe computes with activations as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from offmoe.checkpoint.base import Checkpoint, TensorInfo, quote
from offmoe.checkpoint.int4 import Int4Tensors, Packing, check_zero_points
from offmoe.checkpoint.parts import Parts
from offmoe.checkpoint.scaled import ScaledTensors
from offmoe.errors import OffmoeError

Table = Mapping[str, Any]


def packing_of(config: object) -> Packing | None:
    """Packing of 4-bit codes in groups; None for every other format, which the tensors themselves describe.

    Raises OffmoeError, by field and value, on what is not implemented.
    """
    if config is None:
        return None
    table: Table = config if isinstance(config, Mapping) else {"quant_method": config}
    method = table.get("quant_method", table.get("quant_library"))
    if not isinstance(method, str) or method not in METHODS:
        raise OffmoeError(
            f"quantization_config: quant_method is {quote(method)}, and offmoe implements {', '.join(METHODS)}: "
            "this model cannot be run yet"
        )
    return METHODS[method](table)


def assemble(checkpoint: Checkpoint, config: object) -> None:
    """Replace tensors that are parts of one matrix by that matrix, in `checkpoint.tensors`.

    Zero points and column groups that the config declares trivial are checked here, for a layer's first expert only:
    the 18,000 small reads for the other experts of a large model are made when their records are read.
    """
    packing, parts = packing_of(config), Parts(checkpoint.tensors)
    found = list(ScaledTensors(parts).matrices())
    found += Int4Tensors(parts, packing).matrices() if packing else ()
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in parts.used}
    checkpoint.tensors = {**kept, **{info.name: checked(checkpoint, info) for info in found}}


def checked(checkpoint: Checkpoint, info: TensorInfo) -> TensorInfo:
    """Return a matrix, refused if its zero points or column groups contradict the config."""
    _, _, expert = info.name.partition(".experts.")
    if info.refusal or (expert and not expert.startswith("0.")):
        return info
    try:
        check_zero_points(checkpoint, info)
    except OffmoeError as error:
        return replace(info, refusal=f"is no matrix that offmoe can read: {error}")
    return info


def awq(config: Table) -> Packing:
    """AWQ, as AutoAWQ and llm-compressor write it."""
    demand(config, "awq", bits=(4,), zero_point=(True,), version=("gemm", "GEMM", None), format=("gemm", None))
    return Packing("awq", group_size(config, "awq"), zeros=True)


def gptq(config: Table) -> Packing:
    """GPTQ, as AutoGPTQ and GPTQModel write it; zero points in the first format are one too small."""
    demand(config, "gptq", bits=(4,), desc_act=(False, None), sym=(True, False), pack_dtype=("int32", None),
           checkpoint_format=("gptq", "gptq_v2", None), format=("gptq", "gptq_v2", None),
           is_marlin_format=(False, None))  # fmt: skip
    others = [name for name in config.get("dynamic") or {} if not str(name).startswith("-:")]  # those leave modules out
    if others:
        raise refused("gptq", "dynamic", others[0], "one way for all modules")
    first = "gptq_v2" not in (config.get("checkpoint_format"), config.get("format"))
    return Packing("gptq", group_size(config, "gptq"), zeros=not config["sym"], zero_offset=int(first))


def fp8(config: Table) -> None:
    """Float8 of DeepSeek-V3 and Qwen3, and of transformers with one scale a matrix."""
    demand(config, "fp8", weight_block_size=([128, 128], None), fmt=("e4m3", "float8_e4m3fn", None))


def mxfp4(config: Table) -> None:
    """MXFP4 of gpt-oss."""


def modelopt(config: Table) -> None:
    """Formats of NVIDIA's Model Optimizer (modelopt.torch.export)."""
    algorithms = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4")
    demand(config, "modelopt", quant_algo=(*algorithms, "MIXED_PRECISION"), group_size=(16, None))
    layers = config.get("quantized_layers") or {}
    for layer in layers.values() if isinstance(layers, Mapping) else [layers]:
        if not isinstance(layer, Mapping):
            raise refused("modelopt", "quantized_layers", layer, "a quant_algo for each")
        demand(layer, "modelopt", quant_algo=algorithms, group_size=(16, None))


def compressed_tensors(config: Table) -> Packing | None:
    """Formats of llm-compressor; a group of modules may have a format of its own."""
    method = "compressed-tensors"
    demand(config, method, sparsity_config=(None, {}), transform_config=(None, {}))
    groups = config.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    if not groups or not all(isinstance(g, Mapping) and isinstance(g.get("weights"), Mapping) for g in groups):
        raise refused(method, "config_groups", config.get("config_groups"), "groups of modules with their weights")
    schemes = []  # with 4-bit codes
    for group in groups:
        name, weights = group.get("format") or config.get("format"), group["weights"]
        if name == PACKED:
            schemes.append(weights)
            continue
        if name not in WEIGHTS:
            raise refused(method, "format", name, " or ".join((PACKED, *WEIGHTS)))
        demand(weights, method, type=("float",), symmetric=(True, None), dynamic=(False, None), **WEIGHTS[name])
    return pack_quantized(schemes) if schemes else None


def pack_quantized(schemes: list[Table]) -> Packing:
    """4-bit codes of compressed-tensors."""
    method, weights = "compressed-tensors", schemes[0]
    if any(scheme != weights for scheme in schemes):
        raise refused(method, "config_groups", schemes, f"the same weights in all groups of {PACKED}")
    demand(weights, method, num_bits=(4,), type=("int", None), symmetric=(True, False, None), dynamic=(False, None),
           strategy=("group", "channel"), actorder=(None, False, "weight", "static"))  # fmt: skip
    group = -1 if weights["strategy"] == "channel" else group_size(weights, method)
    return Packing(method, group, zeros=weights.get("symmetric") is False)


PACKED = "pack-quantized"
FLOAT8: dict[str, tuple[object, ...]] = {
    "num_bits": (8,), "strategy": ("channel", "tensor", "block"), "block_structure": ([128, 128], None),
}  # fmt: skip
WEIGHTS: dict[str, dict[str, tuple[object, ...]]] = {  # float formats of compressed-tensors
    "float-quantized": FLOAT8,
    "naive-quantized": FLOAT8,
    "nvfp4-pack-quantized": {"num_bits": (4,), "strategy": ("tensor_group",), "group_size": (16,)},
    "mxfp4-pack-quantized": {"num_bits": (4,), "strategy": ("group",), "group_size": (32,)},
}
METHODS: dict[str, Callable[[Table], Packing | None]] = {
    "fp8": fp8, "mxfp4": mxfp4, "modelopt": modelopt, "modelopt_fp4": modelopt, "awq": awq, "gptq": gptq,
    "compressed-tensors": compressed_tensors,
}  # fmt: skip


def demand(config: Table, method: str, **allowed: tuple[object, ...]) -> None:
    """Raise OffmoeError unless every field has one of its values; None: it may be missing."""
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
        f"quantization_config of {method}: {field} is {quote(value)}, and offmoe implements {implemented}: "
        "this model cannot be run yet"
    )
