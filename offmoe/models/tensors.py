"""Tensors of a checkpoint by the roles that they play in a model: found by name, refused where shapes do not fit."""

from __future__ import annotations

from dataclasses import replace

from offmoe.checkpoint.base import Checkpoint, TensorInfo
from offmoe.checkpoint.row_major import ToRowMajor, TransposeColumns
from offmoe.checkpoint.scales import FloatScales
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import FORMATS
from offmoe.kernels.planes import plane_sizes
from offmoe.kernels.record import RecordLayout
from offmoe.mixers.base import MixerConfig, Names
from offmoe.mixers.latent.rows import FLOATS
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family
from offmoe.models.shapes import bias_shapes, trunk_roles


def find(checkpoint: Checkpoint, names: Names, role: str, layer: int, expert: int) -> TensorInfo | None:
    """The tensor that plays `role`, under the first of its names that exists."""
    for template in names.get(role, ()):
        if info := checkpoint.tensors.get(template.format(l=layer, e=expert)):
            return info
    return None


def holder(checkpoint: Checkpoint, names: Names, mixer: MixerConfig, role: str, layer: int) -> str:
    """The role of the tensor that has the rows of `role`: its own, or the one that holds several where that exists."""
    other = mixer.held.get(role, role)
    alone = find(checkpoint, names, role, layer, 0) or not find(checkpoint, names, other, layer, 0)
    return role if alone else other


def expect(
    checkpoint: Checkpoint, names: Names, role: str, layer: int, expert: int, shape: tuple[int, ...]
) -> TensorInfo:
    """The tensor of `role`. Raises OffmoeError where there is none or its shape is not `shape`."""
    info = find(checkpoint, names, role, layer, expert) or lone_part(checkpoint, names, role, layer, expert)
    if info is None:
        name = names[role][0].format(l=layer, e=expert)
        raise OffmoeError(f"{checkpoint.path} has no tensor {name}: the file is incomplete or of another model")
    checkpoint.check_usable(info)
    if [n for n in info.shape if n > 1] != [n for n in shape if n > 1]:  # a single row may be written as a vector
        raise OffmoeError(f"tensor {info.name} has shape {list(info.shape)}: the config asks for {list(shape)}")
    return info


def lone_part(checkpoint: Checkpoint, names: Names, role: str, layer: int, expert: int) -> TensorInfo | None:
    """A tensor that is a part of the missing one of `role` and has become part of no matrix, so that it is refused."""
    both = names.get("gate_up", ()) if role in ("gate", "up") else ()
    stems = tuple(name.format(l=layer, e=expert).removesuffix(".weight") for name in (*names.get(role, ()), *both))
    beginnings = tuple(stem + mark for stem in stems for mark in "._")
    return next((i for name, i in checkpoint.tensors.items() if i.refusal and name.startswith(beginnings)), None)


def is_split(checkpoint: Checkpoint, names: Names) -> bool:
    """Whether latent attention's kv_b is stored in two halves."""
    return find(checkpoint, names, "k_b", 0, 0) is not None


def check_trunk(checkpoint: Checkpoint, names: Names, config: ModelConfig) -> None:
    """Raise OffmoeError unless every tensor but the routed experts' exists with the config's shape."""
    for role, layer, shape in trunk_roles(config, is_split(checkpoint, names)):
        mixer = config.mixers[layer]
        there = holder(checkpoint, names, mixer, role, layer)
        expect(checkpoint, names, there, layer, 0, shape if there == role else mixer.held_shape(there, config.hidden))
    if config.moe.expert_bias:
        for layer in config.routed:
            expert_biases(checkpoint, names, config, layer)


def expert_biases(checkpoint: Checkpoint, names: Names, config: ModelConfig, layer: int) -> dict[str, list[TensorInfo]]:
    """Role → tensors of the biases of a layer's experts: one of them all, or one for each."""
    both = "gate_up_bias" in names and find(checkpoint, names, "gate_bias", layer, 0) is None
    found = {}
    for role, shape in bias_shapes(config, both).items():
        first = find(checkpoint, names, role, layer, 0)
        apart = first is not None and len(first.shape) == 1
        each = range(config.experts if apart else 1)
        found[role] = [expect(checkpoint, names, role, layer, expert, shape[apart:]) for expert in each]
    return found


def record_layout(
    checkpoint: Checkpoint, family: Family, names: Names, config: ModelConfig, layer: int
) -> RecordLayout:
    """Check the experts of a layer and lay out their record: every expert must have the same formats."""
    inner = config.moe.expert_hidden
    wide, narrow = (inner, config.hidden), (config.hidden, inner)
    shapes = {"gate": wide, "up": wide, "down": narrow}
    stacked = find(checkpoint, names, "gate_up", layer, 0)
    if stacked:
        shapes = {"gate_up": (2 * wide[0], wide[1]), "down": narrow}
    parts = []
    for role, shape in shapes.items():
        first = find(checkpoint, names, role, layer, 0)
        if first is not None and len(first.shape) == 3:
            expect(checkpoint, names, role, layer, 0, (config.experts, *shape))
            formats = {first.format}
        else:
            each = [expect(checkpoint, names, role, layer, expert, shape) for expert in range(config.experts)]
            formats = {info.format for info in each}
        if len(formats) > 1:
            raise OffmoeError(
                f"layer {layer} keeps its {role} experts in {' and '.join(sorted(formats))}: expected one"
            )
        parts.append((role, formats.pop(), *shape))
        form = FORMATS[parts[-1][1]]
        if role == "gate_up" and form.scales and form.tiled and wide[0] % form.scales.rows:
            raise OffmoeError(
                f"layer {layer} stacks gate on up experts of {wide[0]} rows in {form.name}, of which "
                f"{form.scales.rows} share scales: offmoe cannot take such apart yet"
            )
        if (form.scales or form.apart) and (odd := [n for n in plane_sizes(form.name, *shape) if n % 16]):
            raise OffmoeError(
                f"layer {layer} has {role} experts of {list(shape)} in {form.name}, whose scales end {odd[0] % 16} "
                "bytes behind a multiple of 16: offmoe cannot move such records yet"
            )
    interleaved = stacked is not None and family.interleaved_experts
    return RecordLayout.of(*parts, interleaved=interleaved)


def transpose_experts(checkpoint: Checkpoint, names: Names, config: ModelConfig) -> None:
    """Present stacked experts that are [E, cols, rows] in the file as [E, rows, cols].

    transformers 5 writes some of these families in the second way: no layer has both matrices of both shapes.
    """
    hidden, inner = config.hidden, config.moe.expert_hidden
    wanted = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    for layer in config.routed:
        found = {role: info for role in wanted if (info := find(checkpoint, names, role, layer, 0))}
        stacks = {role: info for role, info in found.items() if by_rows(info)}
        if all(info.shape[1:] == wanted[role] for role, info in stacks.items()) and len(stacks) == len(wanted):
            continue
        for info in stacks.values():
            checkpoint.tensors[info.name] = by_rows(info) or info


def by_rows(info: TensorInfo) -> TensorInfo | None:
    """Return a stack of matrices stored by columns as one of rows; None where its layout tells them, or it is no stack.

    Scales for rows or blocks tell the rows; floats, and float8 with one scale for a matrix, have none.
    """
    if len(info.shape) != 3 or info.refusal:
        return None
    experts, cols, rows = info.shape
    converter: ToRowMajor | None = None
    if info.format in FLOATS and not info.row_major:
        converter = TransposeColumns(rows, cols, FORMATS[info.format].bytes)
    elif info.format == "F8_E4M3_ROW" and isinstance(info.row_major, FloatScales) and info.row_major.count == 1:
        converter = replace(info.row_major, repeats=rows, columns=((cols, rows),))
    return replace(info, shape=(experts, rows, cols), row_major=converter) if converter else None
