"""Parameters and bytes of a model, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from offmoe.checkpoint.base import TensorInfo
from offmoe.kernels.formats import FORMATS
from offmoe.models.config import ModelConfig
from offmoe.models.model import Model
from offmoe.models.shapes import trunk_roles


@dataclass(frozen=True)
class Weights:
    """Parameters and bytes, counted from the files."""

    total: int
    active: int  # a token: everything but the experts that it is not routed to
    active_without_embedding: int  # some models' published figure leaves the input embedding out
    trunk_bytes: int  # in the file, of everything but the routed experts
    unpacked_bytes: int  # more on a GPU, which holds float8 as bfloat16, and floats for what no format holds


def count_weights(model: Model) -> Weights:
    total, active, without_embedding = count_parameters(model.config)
    return Weights(
        total=total,
        active=active,
        active_without_embedding=without_embedding,
        trunk_bytes=sum(info.nbytes for info in trunk_tensors(model)) + 4 * bias_weights(model.config),
        unpacked_bytes=sum(map(unpacked_bytes, trunk_tensors(model))),
    )


def unpacked_bytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes on a GPU beyond those in its file."""
    form = FORMATS[info.format]
    if form.tiled:
        return info.range.nbytes
    if not info.row_major:
        return 0
    *rows, cols = info.shape
    return max(0, form.nbytes(prod(rows), cols) - info.nbytes)


def count_parameters(config: ModelConfig) -> tuple[int, int, int]:
    """Parameters in total; active a token; active without the input embedding, unless that is the head too."""
    c = config
    routed = c.moe_layers * c.experts * 3 * c.hidden * c.moe.expert_hidden + bias_weights(c)
    resident = trunk_weights(c)
    active = resident + routed * c.top_k // c.experts
    return resident + routed, active, active - (0 if c.stream.tied else c.vocab * c.hidden)


def trunk_weights(config: ModelConfig) -> int:
    """Parameters of everything but the routed experts."""
    return sum(prod(shape) for _, _, shape in trunk_roles(config))


def bias_weights(config: ModelConfig) -> int:
    """Biases of all routed experts: they stay with the trunk, in float32, and count as the experts' parameters."""
    moe = config.moe
    return config.moe_layers * moe.experts * (2 * moe.expert_hidden + config.hidden) if moe.expert_bias else 0


def trunk_tensors(model: Model) -> Iterator[TensorInfo]:
    """Tensors that are used, but for the routed experts'; files may hold more (layers that predict several tokens)."""
    found = (model.stored(role, layer)[0] for role, layer, _ in trunk_roles(model.config, model.split))
    yield from {info.name: info for info in found}.values()
