"""Assemble quantised matrices out of their tensors, as the files and the tensors themselves describe them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from offmoe.checkpoint.base import Checkpoint, TensorInfo
from offmoe.checkpoint.int4 import Int4Tensors, check_bits, in_floats, settled
from offmoe.checkpoint.int4_rows import Packing
from offmoe.checkpoint.parts import Parts
from offmoe.checkpoint.scaled import ScaledTensors
from offmoe.errors import OffmoeError
from offmoe.models.quantisation_methods import Description, read_description

FIELDS = ("quantization_config", "compression_config")  # of config.json; the second is llm-compressor's older one
# Files next to config.json, of Model Optimizer, AutoGPTQ or GPTQModel, and AutoAWQ, and the method that they mean.
FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
EXPERT = re.compile(r"\.experts\.\d+\.")


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
            table = inner if isinstance(inner, Mapping) else found
            return {**table, "quant_method": table.get("quant_method") or method}
    return None


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
