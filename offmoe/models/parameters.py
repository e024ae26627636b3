"""Parameters and bytes of a model, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from offmoe.checkpoint.base import TensorInfo
from offmoe.kernels.formats import FORMATS
from offmoe.models.config import ModelConfig
from offmoe.models.model import Model
from offmoe.models.shapes import trunk_roles, trunk_shapes


@dataclass(frozen=True)
class Weights:
    """Parameters and bytes, counted from the files."""

    total: int
    active: int  # a token: everything but the experts that it is not routed to
    active_without_embedding: int  # some models leave the input embedding out of their own figure
    trunk_bytes: int  # of everything but the routed experts, in the file
    unpacked_bytes: int  # that a GPU holds beyond these: float8 in bfloat16


def count_weights(model: Model) -> Weights:
    total, active, without_embedding = count_parameters(model.config)
    return Weights(
        total=total,
        active=active,
        active_without_embedding=without_embedding,
        trunk_bytes=sum(info.nbytes for info in trunk_tensors(model)) + 4 * bias_weights(model.config),
        unpacked_bytes=sum(info.range.nbytes for info in trunk_tensors(model) if FORMATS[info.format].tiled),
    )


def count_parameters(config: ModelConfig) -> tuple[int, int, int]:
    """In total; active a token; of these without the input embedding, where that is not the head too."""
    c = config
    routed, resident = c.moe_layers * c.experts * 3 * c.hidden * c.expert_hidden + bias_weights(c), trunk_weights(c)
    active = resident + routed * c.top_k // c.experts
    return resident + routed, active, active - (0 if c.tied else prod(trunk_shapes(c)["embed"]))


def trunk_weights(config: ModelConfig) -> int:
    """Parameters of everything that is no routed expert."""
    return sum(prod(shape) for _, _, shape in trunk_roles(config))


def bias_weights(config: ModelConfig) -> int:
    """Of all routed experts; they stay beside the trunk, in float32, and count as the experts'."""
    return config.moe_layers * config.experts * (2 * config.expert_hidden + config.hidden) if config.expert_bias else 0


def trunk_tensors(model: Model) -> Iterator[TensorInfo]:
    """Everything that is used and no routed expert; files may hold more (layers that predict several tokens)."""
    found = (model.stored(role, layer)[0] for role, layer, _ in trunk_roles(model.config, model.split))
    yield from {info.name: info for info in found}.values()
