"""Convert safetensors to one GGUF, piece by piece; an incomplete file never appears."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from offmoe.cache.files import check_output, draft, is_stream
from offmoe.checkpoint.base import Checkpoint, TensorInfo
from offmoe.errors import OffmoeError, users_mistakes
from offmoe.kernels.formats import FORMATS, Format
from offmoe.mixers.base import GgufRows
from offmoe.mixers.registry import float32_roles
from offmoe.models.family import Values
from offmoe.models.model import Model, described
from offmoe.models.shapes import layer_shapes, model_shapes
from offmoe.models.tensors import expert_biases
from offmoe.pack.gguf_keys import model_keys, rope_tensors
from offmoe.pack.quantise import packable, quantise
from offmoe.pack.tokenizer_keys import tokenizer_keys
from offmoe.settings import format_size

PIECE = 1 << 22  # weights read, quantised and written at once: 16 MiB in float32
EXPERT_ROLES = ("gate", "up", "down")
FILE_TYPES = {  # general.file_type
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "MXFP4": 38,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ2_S": 28,
    "IQ3_XXS": 23,
    "IQ3_S": 26,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}


@dataclass(frozen=True)
class Fallback:
    """A tensor stored in another format, because its rows are not a whole number of the requested format's blocks."""

    name: str
    cols: int
    requested: str
    format: str

    def __str__(self) -> str:
        return f"{self.name}: rows of {self.cols} weights do not fit {self.requested}, stored as {self.format}"


@dataclass(frozen=True)
class PackReport:
    """Result of `pack`: tensors that are not in the requested format, and the size of the file in bytes."""

    fallbacks: list[Fallback]
    bytes: int


@dataclass(frozen=True)
class RowRange:
    """Rows `first` to `first + count` of a tensor in the source. `transform` maps all of them to the rows to write."""

    info: TensorInfo
    first: int
    count: int
    transform: Values | None = None


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the GGUF, concatenated from ranges of rows."""

    name: str
    shape: tuple[int, ...]
    requested: Format
    row_ranges: list[RowRange]
    values: Tensor | None = None  # if they are computed instead of read

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def format(self) -> Format:
        """Requested format, or the fallback if the rows do not fit its blocks."""
        fits = (fmt for fmt in (self.requested, FORMATS["Q8_0"]) if self.cols % fmt.block == 0)
        return next(fits, FORMATS["F32"])

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(prod(self.shape[:-1]), self.cols)


def pack(checkpoint: Checkpoint, out: Path, fmt: str, progress: Callable[[int, int], None]) -> PackReport:
    """Write a safetensors checkpoint as the GGUF `out`, with weights in `fmt` ("q4_0", "q6_k", "bf16", …).

    Norms and routers stay F32. mxfp4 is used for the experts only and Q8_0 for the rest, as in llama.cpp. Rows that do
    not fit `fmt` become Q8_0 or else F32, and are listed in the report. `progress` is called with (bytes done, total
    bytes). `out` is replaced atomically. Raises OffmoeError.
    """
    if checkpoint.kind == "gguf":
        raise OffmoeError(f"{checkpoint.path} is already a GGUF: give a directory of safetensors")
    requested = packable(fmt)
    model = described(checkpoint)
    outputs = [output(model, role, layer, target_format(role, requested)) for role, layer in tensor_roles(model)]
    factors = rope_tensors(model.config).items()
    outputs += [OutputTensor(name, tuple(values.shape), FORMATS["F32"], [], values) for name, values in factors]
    keys = model_keys(model.config, model.family) | tokenizer_keys(checkpoint, model.config.vocab)
    keys |= {"general.file_type": FILE_TYPES[requested.name], "general.quantization_version": 2}
    check_target(out, sum(output.nbytes for output in outputs))
    write(model, outputs, keys, out, progress)
    fallbacks = [Fallback(o.name, o.cols, o.requested.name, o.format.name) for o in outputs if o.format != o.requested]
    return PackReport(fallbacks, out.stat().st_size)


def tensor_roles(model: Model) -> Iterator[tuple[str, int]]:
    """Yield every tensor of the GGUF as (role, layer), in the order of the file."""
    config, names = model.config, model.family.gguf_names
    yield from ((role, 0) for role in model_shapes(config))
    for layer, mixer in enumerate(config.mixers):
        own = [role if role in names else mixer.held[role] for role in layer_shapes(config, layer, split=True)]
        yield from ((role, layer) for role in dict.fromkeys(own))
        if layer in config.routed:
            yield from ((role, layer) for role in EXPERT_ROLES)
            yield from ((f"{role}_bias", layer) for role in EXPERT_ROLES if config.moe.expert_bias)


def target_format(role: str, requested: Format) -> Format:
    """Return the format of a role: F32 for small tensors, Q8_0 instead of MXFP4 outside the experts."""
    small = ("router", "norm", "bias", "sinks", "offset", "gain", "factors", "scale")
    if role.endswith(small) or role in float32_roles():
        return FORMATS["F32"]
    return FORMATS["Q8_0"] if requested.name == "MXFP4" and role not in EXPERT_ROLES else requested


def output(model: Model, role: str, layer: int, requested: Format) -> OutputTensor:
    """Describe one tensor of the GGUF and the rows of the source that it is made of."""
    name, c, moe = model.family.gguf_names[role][0].format(l=layer), model.config, model.config.moe
    if role in EXPERT_ROLES:
        row_ranges = [expert_rows(model, role, layer, expert) for expert in range(c.experts)]
        wide, narrow = (c.experts, moe.expert_hidden, c.hidden), (c.experts, c.hidden, moe.expert_hidden)
        return OutputTensor(name, narrow if role == "down" else wide, requested, row_ranges)
    if role.removesuffix("_bias") in EXPERT_ROLES:
        found = expert_biases(model.checkpoint, model.names, c, layer)
        half = None if role in found else lambda rows: gate_or_up_rows(rows.mT, role, model.layouts[0].interleaved).mT
        row_ranges = [
            RowRange(info, 0, prod(info.shape[:-1]), half) for info in found[role if role in found else "gate_up_bias"]
        ]
        width = c.hidden if role == "down_bias" else moe.expert_hidden
        return OutputTensor(name, (c.experts, width), requested, row_ranges)
    shapes = {**model_shapes(c), **layer_shapes(c, layer, split=True)}
    if parts := c.mixers[layer].gguf_rows(role):
        return OutputTensor(name, shapes[role], requested, [mixer_rows(model, part, layer) for part in parts])
    whole = model.find(role, layer)
    info, rows = (whole, None) if whole else model.stored(role, layer)
    row_range = RowRange(info, 0, prod(info.shape[:-1]), gguf_transform(model, role, layer, rows))
    return OutputTensor(name, shapes.get(role, info.shape), requested, [row_range])


def gguf_transform(model: Model, role: str, layer: int, rows: Tensor | None) -> Values | None:
    """Return the conversion of a role's tensor to the layout of a GGUF, or None for identity.

    `rows` selects rows first.
    """
    weight_transform, family = model.weight_transform(role), model.family
    order = model.config.mixers[layer].gguf_order(role, family.interleaved_gguf, family.tiled_gguf)
    if rows is None and not (weight_transform or order):
        return None

    def transform(weight: Tensor) -> Tensor:
        weight = weight if rows is None else weight[rows]
        weight = weight_transform(weight) if weight_transform else weight
        return order(weight) if order else weight

    return transform


def mixer_rows(model: Model, part: GgufRows, layer: int) -> RowRange:
    """Return the rows that a mixer takes from the tensor of another role."""
    info = model.find(part.role, layer)
    assert info is not None, f"{part.role} of layer {layer} was there when the model was described"
    return RowRange(info, part.first, part.count, Tensor.t if part.transposed else None)


def expert_rows(model: Model, role: str, layer: int, expert: int) -> RowRange:
    """Return the rows of one expert's matrix: of its own tensor, of a stack, or of a stack of gate and up."""
    info = model.find(role, layer, expert) or model.find("gate_up", layer, expert)
    assert info is not None, f"{role} of layer {layer} was there when the model was described"
    layout = model.layouts[model.config.routed.index(layer)]
    if layout.interleaved and role != "down":
        rows = info.shape[-2]
        first = expert * rows if len(info.shape) == 3 else 0
        return RowRange(info, first, rows, lambda matrix: gate_or_up_rows(matrix, role, interleaved=True))
    count = model.config.hidden if role == "down" else model.config.moe.expert_hidden
    first = expert * info.shape[1] if len(info.shape) == 3 else 0
    return RowRange(info, first + (count if role == "up" and info.shape[-2] == 2 * count else 0), count)


def gate_or_up_rows(rows: Tensor, role: str, interleaved: bool) -> Tensor:
    """Return the rows of `role` from the rows of gate and up together."""
    second = role.startswith("up")
    return rows[second::2] if interleaved else rows.chunk(2)[second]


def check_target(out: Path, nbytes: int) -> None:
    """Raise OffmoeError before anything is written, if `out` is not writable or the disk is too small."""
    with users_mistakes():
        check_output(out, True, ".gguf")
        if is_stream(out):
            raise OffmoeError(f"{out} is a device or a pipe: a packed model needs a file")
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise OffmoeError(disk_full(out, nbytes, f"only {format_size(free)} are free"))


def disk_full(out: Path, nbytes: int, reason: str) -> str:
    return f"cannot write {out}, which takes {format_size(nbytes)}: {reason}"


def write(
    model: Model, outputs: list[OutputTensor], keys: dict[str, Any], out: Path, progress: Callable[[int, int], None]
) -> None:
    """Write a temporary file next to `out` and rename it once it is on the disk."""
    total, done = sum(output.nbytes for output in outputs), 0
    try:
        with draft(out) as temporary, closing(gguf.GGUFWriter(temporary, model.family.arch)) as writer:
            write_header(writer, outputs, keys)
            (file,) = writer.fout
            with ThreadPoolExecutor() as pool:
                for output in outputs:
                    writer.write_padding(file, file.tell())
                    for piece in pieces(model, output):
                        done += write_piece(file, piece, output, pool)
                        progress(done, total)
            writer.write_padding(file, file.tell())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OffmoeError(disk_full(out, total, error.strerror or str(error))) from error


def write_header(writer: gguf.GGUFWriter, outputs: list[OutputTensor], keys: dict[str, Any]) -> None:
    """Write the metadata and the table of tensors."""
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        add[type(value)](key, value)
    for output in outputs:
        kind = gguf.GGMLQuantizationType(output.format.gguf_type)
        writer.add_tensor_info(output.name, output.shape, torch.float32, output.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def pieces(model: Model, output: OutputTensor) -> Iterator[Tensor]:
    """Yield the weights of a tensor as float32 [rows, cols], about PIECE at a time."""
    if output.values is not None:
        yield output.values.view(1, -1)
    for row_range in output.row_ranges:
        step = row_range.count if row_range.transform else max(1, PIECE // output.cols)
        for first in range(0, row_range.count, step):
            rows = model.checkpoint.rows(row_range.info, row_range.first + first, min(step, row_range.count - first))
            yield row_range.transform(rows).contiguous() if row_range.transform else rows


def write_piece(file: Any, piece: Tensor, output: OutputTensor, pool: ThreadPoolExecutor) -> int:
    """Quantise a piece on all cores and write it; return the number of bytes."""
    largest = 65504.0 if output.format.name == "F16" else torch.finfo(torch.float32).max
    if not piece.abs().max() <= largest:  # also true for NaN
        found = f"{output.name} has NaN or weights beyond {largest:g}"
        raise OffmoeError(f"{found}, which {output.format.name} cannot represent: use bf16, or copy the model again")
    parts = piece.chunk(max(1, min(os.cpu_count() or 1, piece.numel() >> 16)))
    for blocks in pool.map(lambda part: quantise(part, output.format), parts):
        file.write(blocks.numpy())
    return output.format.nbytes(*piece.shape)
