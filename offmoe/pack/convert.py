"""safetensors to one GGUF, piece by piece, and no half file whatever happens."""

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

from offmoe.checkpoint.base import Checkpoint, TensorInfo
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import FORMATS, Format
from offmoe.mixers.base import GgufRows
from offmoe.mixers.registry import float32_roles
from offmoe.models.family import Values
from offmoe.models.model import Model, described
from offmoe.models.shapes import layer_shapes, model_shapes
from offmoe.pack.gguf_keys import model_keys, rope_tensors, tokenizer_keys
from offmoe.pack.quantise import packable, quantise
from offmoe.settings import format_size

PIECE = 1 << 22  # weights read, quantised and written together: 16 MiB in float32
EXPERT_ROLES = ("gate", "up", "down")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12,
              "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
              "MXFP4": 38}  # fmt: skip  # general.file_type


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows are no whole number of the wanted format's blocks."""

    name: str
    cols: int
    wanted: str
    format: str

    def __str__(self) -> str:
        return f"{self.name}: rows of {self.cols} weights do not fit {self.wanted}, stored as {self.format}"


@dataclass(frozen=True)
class PackReport:
    """What was written: tensors that are not in the format asked for, and the size of the file."""

    fallbacks: list[Fallback]
    bytes: int


@dataclass(frozen=True)
class Run:
    """Rows `first` to `first + count` of a tensor in the source; of all of them `pick` makes the rows to write."""

    info: TensorInfo
    first: int
    count: int
    pick: Values | None = None


@dataclass(frozen=True)
class Output:
    """A tensor of the GGUF, made of runs of rows."""

    name: str
    shape: tuple[int, ...]
    wanted: Format
    runs: list[Run]
    made: Tensor | None = None  # its values, where they come from no file

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def format(self) -> Format:
        """The format wanted, or what holds such rows instead."""
        fits = (form for form in (self.wanted, FORMATS["Q8_0"]) if self.cols % form.block == 0)
        return next(fits, FORMATS["F32"])

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(prod(self.shape[:-1]), self.cols)


def pack(checkpoint: Checkpoint, out: Path, fmt: str, progress: Callable[[int, int], None]) -> PackReport:
    """Write a safetensors checkpoint as the GGUF `out`, its weights in `fmt` ("q4_0", "q6_k", "bf16", …).

    Norms and routers stay F32; mxfp4 is for the experts, the rest is Q8_0 then, as in llama.cpp. Rows that
    `fmt` cannot hold become Q8_0, or else F32, and are listed. `progress(bytes done, bytes in all)`.
    `out` appears complete or not at all. Raises OffmoeError; an existing `out` is replaced.
    """
    if checkpoint.kind == "gguf":
        raise OffmoeError(f"{checkpoint.path} is a GGUF already: pack takes a directory of safetensors")
    wanted = packable(fmt)
    model = described(checkpoint)
    outputs = [output(model, role, layer, intended(role, wanted)) for role, layer in roles(model)]
    made = rope_tensors(model.config)
    outputs += [Output(name, tuple(values.shape), FORMATS["F32"], [], values) for name, values in made.items()]
    keys = model_keys(model.config, model.family) | tokenizer_keys(checkpoint, model.config.vocab)
    keys |= {"general.file_type": FILE_TYPES[wanted.name], "general.quantization_version": 2}
    check_target(out, sum(output.nbytes for output in outputs))
    write(model, outputs, keys, out, progress)
    fell = [Fallback(o.name, o.cols, o.wanted.name, o.format.name) for o in outputs if o.format != o.wanted]
    return PackReport(fell, out.stat().st_size)


def roles(model: Model) -> Iterator[tuple[str, int]]:
    """Every tensor of the GGUF as (role, layer), in the order of the file."""
    config, names = model.config, model.family.gguf_names
    yield from ((role, 0) for role in model_shapes(config))
    for layer, mixer in enumerate(config.mixers):
        own = layer_shapes(config, layer, split=True)
        yield from (
            (role, layer) for role in dict.fromkeys(role if role in names else mixer.held[role] for role in own)
        )
        if layer in config.routed:
            yield from ((role, layer) for role in EXPERT_ROLES)
            yield from ((f"{role}_bias", layer) for role in EXPERT_ROLES if config.moe.expert_bias)


def intended(role: str, wanted: Format) -> Format:
    """Format of the tensor that plays `role`, where `wanted` was asked for."""
    small = role.endswith(("router", "norm", "bias", "sinks", "offset", "gain", "factors", "scale"))
    if small or role in float32_roles():
        return FORMATS["F32"]
    return FORMATS["Q8_0"] if wanted.name == "MXFP4" and role not in EXPERT_ROLES else wanted


def output(model: Model, role: str, layer: int, wanted: Format) -> Output:
    """The GGUF's tensor that plays `role`."""
    name, c, moe = model.family.gguf_names[role][0].format(l=layer), model.config, model.config.moe
    if role in EXPERT_ROLES:
        runs = [expert_run(model, role, layer, expert) for expert in range(c.experts)]
        wide, narrow = (c.experts, moe.expert_hidden, c.hidden), (c.experts, c.hidden, moe.expert_hidden)
        return Output(name, narrow if role == "down" else wide, wanted, runs)
    if role in ("gate_bias", "up_bias") and (both := model.find("gate_up_bias", layer)):
        run = Run(both, 0, c.experts, lambda rows: rows_of(rows.mT, role, model.layouts[0].interleaved).mT)
        return Output(name, (c.experts, moe.expert_hidden), wanted, [run])
    shapes = {**model_shapes(c), **layer_shapes(c, layer, split=True)}
    if pieces := c.mixers[layer].gguf_rows(role):
        return Output(name, shapes[role], wanted, [mixer_run(model, piece, layer) for piece in pieces])
    whole = model.find(role, layer)
    info, rows = (whole, None) if whole else model.stored(role, layer)
    run = Run(info, 0, prod(info.shape[:-1]), reordered(model, role, layer, rows))
    return Output(name, shapes.get(role, info.shape), wanted, [run])


def reordered(model: Model, role: str, layer: int, rows: Tensor | None) -> Values | None:
    """Function from a role's tensor in safetensors to that of a GGUF; `rows`: indices of the role's rows in it."""
    weight_transform, family = model.weight_transform(role), model.family
    order = model.config.mixers[layer].gguf_order(role, family.interleaved_gguf, family.tiled_gguf)
    if rows is None and not (weight_transform or order):
        return None

    def pick(weight: Tensor) -> Tensor:
        weight = weight if rows is None else weight[rows]
        weight = weight_transform(weight) if weight_transform else weight
        return order(weight) if order else weight

    return pick


def mixer_run(model: Model, piece: GgufRows, layer: int) -> Run:
    """Some rows of another role's tensor."""
    info = model.find(piece.role, layer)
    assert info is not None, f"{piece.role} of layer {layer} was there when the model was described"
    return Run(info, piece.first, piece.count, transposed_rows if piece.transposed else None)


def transposed_rows(rows: Tensor) -> Tensor:
    return rows.t()


def expert_run(model: Model, role: str, layer: int, expert: int) -> Run:
    """One expert's matrix: a tensor of its own, a slice of a stack, or half a slice of gate over up."""
    info = model.find(role, layer, expert) or model.find("gate_up", layer, expert)
    assert info is not None, f"{role} of layer {layer} was there when the model was described"
    layout = model.layouts[model.config.routed.index(layer)]
    if layout.interleaved and role != "down":
        rows = info.shape[1]
        return Run(info, expert * rows, rows, lambda matrix: rows_of(matrix, role, interleaved=True))
    count = model.config.hidden if role == "down" else model.config.moe.expert_hidden
    first = expert * info.shape[1] if len(info.shape) == 3 else 0
    return Run(info, first + (count if role == "up" and info.shape[-2] == 2 * count else 0), count)


def rows_of(rows: Tensor, role: str, interleaved: bool) -> Tensor:
    """Of the rows of gate and up together, those of `role`."""
    second = role.startswith("up")
    return rows[second::2] if interleaved else rows.chunk(2)[second]


def check_target(out: Path, nbytes: int) -> None:
    """Raises OffmoeError before anything is written."""
    if out.suffix != ".gguf" or out.is_dir():
        raise OffmoeError(f"{out} is no file name that ends in .gguf: give one for the packed model")
    if not out.parent.is_dir():
        raise OffmoeError(f"{out.parent} is no directory: make it first")
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise OffmoeError(disk_full(out, nbytes, f"{format_size(free)} are free"))


def disk_full(out: Path, nbytes: int, why: str) -> str:
    return f"cannot write {out}, which takes {format_size(nbytes)}: {why}"


def write(
    model: Model, outputs: list[Output], keys: dict[str, Any], out: Path, progress: Callable[[int, int], None]
) -> None:
    """Into a file beside `out`, which takes its place once everything is on the disk."""
    part, total = out.with_name(f".{out.name}.{os.getpid()}"), sum(output.nbytes for output in outputs)
    try:
        with closing(gguf.GGUFWriter(part, model.family.arch)) as writer, ThreadPoolExecutor() as pool:
            write_header(writer, outputs, keys)
            (file,) = writer.fout
            done = 0
            for output in outputs:
                writer.write_padding(file, file.tell())
                for piece in pieces(model, output):
                    done += write_piece(file, piece, output, pool)
                    progress(done, total)
            writer.write_padding(file, file.tell())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
    except OSError as error:
        raise OffmoeError(disk_full(out, total, error.strerror or str(error))) from error
    finally:
        part.unlink(missing_ok=True)


def write_header(writer: gguf.GGUFWriter, outputs: list[Output], keys: dict[str, Any]) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array}  # fmt: skip
    for key, value in keys.items():
        add[type(value)](key, value)
    for output in outputs:
        kind = gguf.GGMLQuantizationType(output.format.gguf_type)
        writer.add_tensor_info(output.name, output.shape, torch.float32, output.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def pieces(model: Model, output: Output) -> Iterator[Tensor]:
    """The weights of a tensor as float32 [rows, cols], a bounded number at a time."""
    if output.made is not None:
        yield output.made.view(1, -1)
    for run in output.runs:
        step = run.count if run.pick else max(1, PIECE // output.cols)
        for first in range(0, run.count, step):
            rows = model.checkpoint.rows(run.info, run.first + first, min(step, run.count - first))
            yield run.pick(rows).contiguous() if run.pick else rows


def write_piece(file: Any, piece: Tensor, output: Output, pool: ThreadPoolExecutor) -> int:
    """Quantise on all cores, write; returns the bytes written."""
    most = 65504.0 if output.format.name == "F16" else torch.finfo(torch.float32).max
    if not piece.abs().max() <= most:  # NaN fails too
        found = f"{output.name} holds NaN or weights beyond {most:g}"
        raise OffmoeError(f"{found}, which {output.format.name} cannot hold: try bf16, or copy the model anew")
    parts = piece.chunk(max(1, min(os.cpu_count() or 1, piece.numel() >> 16)))
    for blocks in pool.map(lambda part: quantise(part, output.format), parts):
        file.write(blocks.numpy())
    return output.format.nbytes(*piece.shape)
