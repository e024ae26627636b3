"""Read what a `quantization_config` says: one function for each `quant_method`.

What the tensors themselves say is not asked of it: sizes of groups, which modules are left out, other bits for some
modules. Schemes for activations and caches are ignored: offmoe computes with activations as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.checkpoint.int4_rows import Packing
from offmoe.errors import OffmoeError

Table = Mapping[str, Any]


@dataclass(frozen=True)
class Description:
    """Statements of a checkpoint's files about its quantisation, as far as the tensors do not say it."""

    packing: Packing | None = None  # of 4-bit codes in words
    refused: Mapping[str, OffmoeError] = field(default_factory=dict)  # modules, by the beginning of their names


def read_description(config: object) -> Description:
    """Return what a description says. Raises OffmoeError, by field and value, on what is not implemented."""
    if config is None or config == {}:
        return Description()
    table: Table = config if isinstance(config, Mapping) else {"quant_method": config}
    method = table.get("quant_method") or table.get("quant_library") or method_of(table)
    if not isinstance(method, str) or method not in METHODS:
        raise OffmoeError(
            f"quantization_config: quant_method is {quote(method)}, and offmoe implements {', '.join(METHODS)}: "
            "this model cannot be run yet"
        )
    return METHODS[method](table)


def method_of(table: Table) -> str | None:
    """Return the method whose fields a description without quant_method has."""
    known = {"config_groups": "compressed-tensors", "quantization_config": "compressed-tensors",
             "quant_algo": "modelopt", "w_bit": "awq"}  # fmt: skip
    return next((method for name, method in known.items() if name in table), None)


def awq(config: Table) -> Description:
    """AWQ, as AutoAWQ, GPTQModel and llm-compressor write it."""
    config = {"bits": config.get("w_bit"), **config}
    demand(config, "awq", bits=(4,), zero_point=(True, None), version=("gemm", "GEMM", None), format=("gemm", None))
    return Description(Packing("awq", zeros=True))


def gptq(config: Table) -> Description:
    """GPTQ, as AutoGPTQ and GPTQModel write it; zero points in the first format are one too small."""
    demand(
        config,
        "gptq",
        bits=(4,),
        desc_act=(True, False, None),
        sym=(True, False, None),
        pack_dtype=("int32", None),
        checkpoint_format=("gptq", "gptq_v2", None),
        format=("gptq", "gptq_v2", None),
        is_marlin_format=(False, None),
    )
    others = any(not str(name).startswith("-:") for name in config.get("dynamic") or {})  # those leave modules out
    first = "gptq_v2" not in (config.get("checkpoint_format"), config.get("format"))
    ordered = bool(config.get("desc_act")) and not config.get("static_groups")
    zeros = others or not config.get("sym")
    return Description(Packing("gptq", zeros=zeros, zero_offset=int(first), act_order=ordered))


def fp8(config: Table) -> Description:
    """Float8 of DeepSeek-V3 and Qwen3, of transformers with one scale a matrix, and MXFP8."""
    demand(config, "fp8", weight_block_size=([128, 128], [1, 32], None), fmt=("e4m3", "float8_e4m3fn", None))
    return Description()


def told_by_tensors(config: Table) -> Description:
    """MXFP4 of gpt-oss, and float8 with a scale for every row."""
    return Description()


def modelopt(config: Table) -> Description:
    """Formats of NVIDIA's Model Optimizer (modelopt.torch.export); of several, each layer's is told apart."""
    demand(config, "modelopt", quant_algo=(*ALGORITHMS, "MIXED_PRECISION", None))
    layers = config.get("quantized_layers") or {}
    if not isinstance(layers, Mapping) or not all(isinstance(layer, Mapping) for layer in layers.values()):
        raise refused("modelopt", "quantized_layers", layers, "a quant_algo for each")
    refusals = {}
    for name, layer in layers.items():
        try:
            demand(layer, "modelopt", quant_algo=ALGORITHMS)
        except OffmoeError as error:
            refusals[name] = error
    return Description(refused=refusals)


def compressed_tensors(config: Table) -> Description:
    """Formats of llm-compressor; a group of modules may have a format of its own.

    One group that offmoe implements is enough: the others may be of modules that no role needs, and their tensors show
    that they are not 4-bit codes or floats.
    """
    inner = config.get("quantization_config")
    config = {**config, **inner} if isinstance(inner, Mapping) else config
    check_sparsity(config.get("sparsity_config"))
    demand(config, LLM, transform_config=(None, {}, {"config_groups": {}}, {"config_groups": None}))
    groups = config.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    groups = [group for group in groups if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)]
    if not groups:
        raise refused(LLM, "config_groups", config.get("config_groups"), "groups of modules with their weights")
    schemes, errors = [], []
    for group in groups:
        try:
            schemes += check_group(group["weights"], group.get("format") or config.get("format"))
        except OffmoeError as error:
            errors.append(error)
    if len(errors) == len(groups):
        raise errors[0]
    return Description(packing_in(schemes) if schemes else None)


def check_sparsity(config: object) -> None:
    """Raise OffmoeError if zeros are left out of the file. Of format dense, they are only counted."""
    if config and not (isinstance(config, Mapping) and config.get("format", "dense") == "dense"):
        value = config.get("format") if isinstance(config, Mapping) else config
        raise refused(LLM, "the format of sparsity_config", value, "'dense'")


def check_group(weights: Table, form: object) -> list[Table]:
    """Return the scheme of 4-bit codes, if the group has one. Raises OffmoeError if it is not implemented."""
    if form == PACKED:
        orders = (*IN_ANY_ORDER, None, False, "weight", "static")
        demand(
            weights,
            LLM,
            num_bits=(4,),
            type=("int", None),
            symmetric=(True, False, None),
            dynamic=(False, None),
            strategy=("group", "channel", None),
            actorder=orders,
        )
        return [weights]
    if form not in WEIGHTS:
        raise refused(LLM, "format", form, " or ".join((PACKED, *map(str, WEIGHTS))))
    demand(weights, LLM, type=("float",), symmetric=(True, None), dynamic=(False, None), **WEIGHTS[form])
    return []


def packing_in(schemes: list[Table]) -> Packing:
    """Return the packing of 4-bit codes of compressed-tensors."""
    symmetric = {scheme.get("symmetric") is not False for scheme in schemes}
    ordered = any(scheme.get("actorder") in IN_ANY_ORDER for scheme in schemes)
    return Packing(LLM, zeros=None if len(symmetric) > 1 else False in symmetric, act_order=ordered)


LLM, PACKED = "compressed-tensors", "pack-quantized"
IN_ANY_ORDER = ("group", "dynamic", True)
FLOAT8: dict[str, tuple[object, ...]] = {"num_bits": (8,), "strategy": ("channel", "tensor", "block", None)}
WEIGHTS: dict[object, dict[str, tuple[object, ...]]] = {  # float formats of compressed-tensors
    "float-quantized": FLOAT8,
    "naive-quantized": FLOAT8,
    "mxfp8-quantized": {"num_bits": (8,), "strategy": ("group", None), "group_size": (32, None)},
    "nvfp4-pack-quantized": {"num_bits": (4,), "strategy": ("tensor_group", None), "group_size": (16, None)},
    "mxfp4-pack-quantized": {"num_bits": (4,), "strategy": ("group", None), "group_size": (32, None)},
}
ALGORITHMS = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "NVFP4",
    "W4A16_NVFP4",
    "NVFP4_AWQ",
    "W4A16_AWQ",
    "MXFP8",
    "W4A8_MXFP4_FP8",
)
METHODS: dict[str, Callable[[Table], Description]] = {
    "fp8": fp8, "fbgemm_fp8": told_by_tensors, "mxfp4": told_by_tensors,
    **dict.fromkeys(("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"), modelopt),
    "awq": awq, "gptq": gptq, LLM: compressed_tensors,
}  # fmt: skip


def demand(config: Table, method: str, **allowed: tuple[object, ...]) -> None:
    """Raise OffmoeError unless every field has one of its values; None: it may be missing."""
    for field_name, wanted in allowed.items():
        value = config.get(field_name)
        if not any(value is one or (type(value) is type(one) and value == one) for one in wanted):
            raise refused(method, field_name, value, " or ".join(repr(one) for one in wanted))


def refused(method: str, name: str, value: object, implemented: str) -> OffmoeError:
    return OffmoeError(
        f"quantization_config of {method}: {name} is {quote(value)}, and offmoe implements {implemented}: "
        "this model cannot be run yet"
    )
