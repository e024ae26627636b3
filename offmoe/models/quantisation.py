"""Read how files pack matrices: the `quantization_config` of a config.json, or what older tools write beside it.

One function for each `quant_method`. What the tensors themselves say is not asked of it: sizes of groups, which modules
are left out, other bits for some modules. Schemes for activations and caches are ignored: offmoe computes with
activations as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from offmoe.checkpoint.base import Checkpoint, TensorInfo, quote
from offmoe.checkpoint.int4 import Int4Tensors, Packing, check_bits, in_floats, settled
from offmoe.checkpoint.parts import Parts
from offmoe.checkpoint.scaled import ScaledTensors
from offmoe.errors import OffmoeError

Table = Mapping[str, Any]
FIELDS = ("quantization_config", "compression_config")  # of config.json; the second is llm-compressor's older one
# Files beside config.json, of Model Optimizer, AutoGPTQ or GPTQModel, and AutoAWQ, and the method that they mean.
FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Description:
    """What a checkpoint's files say of its quantisation, as far as the tensors do not."""

    packing: Packing | None = None  # of 4-bit codes in words
    refused: Mapping[str, OffmoeError] = field(default_factory=dict)  # modules, by the beginning of their names


def described_in(checkpoint: Checkpoint) -> object:
    """Return the description of a checkpoint's quantisation, from the first place that has one; None: there is none."""
    raw = checkpoint.json("config.json") or {}
    text = raw.get("text_config")
    for table in (raw, text if isinstance(text, Mapping) else {}):
        for name in FIELDS:
            if table.get(name) is not None:
                return table[name]
    if not any(info.refusal for info in checkpoint.tensors.values()):
        return None  # floats alone
    for name, method in FILES.items():
        if (found := checkpoint.json(name)) is not None:
            inner = found.get("quantization")
            return {"quant_method": method, **(inner if isinstance(inner, Mapping) else found)}
    return None


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


def assemble(checkpoint: Checkpoint) -> None:
    """Replace tensors that are parts of one matrix by that matrix, in `checkpoint.tensors`.

    A matrix whose parts do not fit, or that is packed as offmoe does not implement, is kept with its refusal.
    """
    description, parts = read_description(described_in(checkpoint)), Parts(checkpoint.tensors)
    found = list(ScaledTensors(parts).matrices())
    if packing := description.packing or undescribed(checkpoint):
        found += Int4Tensors(parts, packing).matrices()
    else:
        found += (replace(info, name=name, refusal=UNDESCRIBED) for name, info in packed_alone(checkpoint))
    matrices: dict[str, TensorInfo] = {}
    for info in settle(checkpoint, found):
        known = checkpoint.tensors.get(info.name)
        if not info.refusal or known is None or known.refusal:
            matrices[info.name] = with_refusal(info, description)
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in parts.used}
    stacks = {name.removesuffix(".weight"): info for name, info in matrices.items() if name.endswith("_proj.weight")
              and len(info.shape) == 3}  # fmt: skip
    checkpoint.tensors = {**stacks, **kept, **matrices}


def settle(checkpoint: Checkpoint, found: list[TensorInfo]) -> list[TensorInfo]:
    """Return matrices as their zero points and column groups make them, all experts of a layer as its first.

    Only the first's are read here: the 18,000 small reads for the others of a large model are made with their records.
    """
    settled_infos, in_any_order = [], set[str]()
    for info in found:
        place = EXPERT.sub(".experts.*.", info.name)
        if info.refusal or (place != info.name and ".experts.0." not in info.name):
            settled_infos.append(info)
            continue
        try:
            check_bits(checkpoint, info)
            changed = settled(checkpoint, info)
        except OffmoeError as error:
            changed = replace(info, refusal=f"is no matrix that offmoe can read: {error}")
        if changed.format != info.format:
            in_any_order.add(place)
        settled_infos.append(changed)
    return [in_floats(info) if EXPERT.sub(".experts.*.", info.name) in in_any_order else info for info in settled_infos]


def with_refusal(info: TensorInfo, description: Description) -> TensorInfo:
    """Return a matrix, refused if its description is."""
    errors = (error for module, error in description.refused.items() if info.name.startswith(f"{module}."))
    error = next(errors, None)
    return replace(info, refusal=f"is described by a {error}") if error else info


def undescribed(checkpoint: Checkpoint) -> Packing | None:
    """Return the packing of codes in words that the tensors alone decide; None: there are none, or they do not.

    Model directories lose their quantize_config.json. compressed-tensors and AWQ can be told by names and shapes; of
    GPTQ, zero points may be stored less one or not, and only the description says.
    """
    for name, info in checkpoint.tensors.items():
        if info.format == "I32" and name.endswith("_packed"):
            return Packing("compressed-tensors")
        scales = checkpoint.tensors.get(name.removesuffix("qweight") + "scales")
        if info.format == "I32" and name.endswith("qweight") and scales and len(scales.shape) == len(info.shape):
            return Packing("awq", zeros=True) if scales.shape[-1] == 8 * info.shape[-1] else None
    return None


def packed_alone(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """Yield names of matrices whose codes are in words, and these."""
    for name, info in checkpoint.tensors.items():
        if name.endswith(".qweight"):
            yield name.removesuffix("qweight") + "weight", info


UNDESCRIBED = (
    "is packed (qweight), and neither config.json nor quantize_config.json says how: expected a quantization_config; "
    "download the whole model directory"
)


def awq(config: Table) -> Description:
    """AWQ, as AutoAWQ, GPTQModel and llm-compressor write it."""
    config = {"bits": config.get("w_bit"), **config}
    demand(config, "awq", bits=(4,), zero_point=(True, None), version=("gemm", "GEMM", None),
           format=("gemm", None))  # fmt: skip
    return Description(Packing("awq", zeros=True))


def gptq(config: Table) -> Description:
    """GPTQ, as AutoGPTQ and GPTQModel write it; zero points in the first format are one too small."""
    demand(config, "gptq", bits=(4,), desc_act=(True, False, None), sym=(True, False, None), pack_dtype=("int32", None),
           checkpoint_format=("gptq", "gptq_v2", None), format=("gptq", "gptq_v2", None),
           is_marlin_format=(False, None))  # fmt: skip
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
        demand(weights, LLM, num_bits=(4,), type=("int", None), symmetric=(True, False, None), dynamic=(False, None),
               strategy=("group", "channel", None), actorder=(*IN_ANY_ORDER, None, False, "weight", "static"))  # fmt: skip
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
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A16_AWQ",
              "MXFP8", "W4A8_MXFP4_FP8")  # fmt: skip
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
