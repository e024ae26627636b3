"""Interfaces between mixers and the trunk: the tensors that a mixer loads, and the methods that run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offmoe.kernels.planes import Matrix
from offmoe.mixers.rope import RopeTables

Part = tuple[Tensor, Matrix]  # a matrix in slot layout: its bytes, and their description
Scratch = Mapping[str, tuple[int, torch.dtype]]  # name → size and type of a static tensor of the decode step


class Tensors(Protocol):
    """Tensors of one layer by role, as `Host` loads them: rows in the order of `row_order`, weights transformed."""

    ropes: RopeTables
    device: torch.device
    dtype: torch.dtype
    tiled: bool  # value heads of DeltaNet are in llama.cpp's order

    def has(self, role: str) -> bool: ...

    def load(self, role: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of `role`, in `self.dtype` unless told otherwise."""
        ...


class DeviceTensors(Tensors, Protocol):
    """The same for `Device`: matrices stay quantised."""

    def parts(self, *roles: str, cols: int) -> tuple[Part, ...]:
        """Matrices [rows, cols] of these roles, one over another; neighbours of one format are one part."""
        ...

    def raw(self, role: str) -> tuple[str, Tensor]:
        """Format and bytes [rows, row bytes] of one matrix."""
        ...

    def in_slots(self, fmt: str, raw: Tensor, cols: int) -> Part:
        """Bytes [rows, row bytes] in slot layout."""
        ...


class HostMixer(Protocol):
    """A layer's mixer on the CPU."""

    def tensors(self) -> list[Tensor]:
        """Its weights."""
        ...

    def mix(self, projected: Tensor, cache: Any, positions: Tensor, start: int) -> Tensor:
        """projected [T, P] of the tokens at `positions` [T], the first of which is `start` → mixed [T, M].

        `cache` (MixerConfig.cache) takes these tokens up.
        """
        ...


class DeviceMixer(HostMixer, Protocol):
    """A layer's mixer on a GPU: `mix` runs a prompt's chunk, `launch` one token of the decode step."""

    def scratch(self, ctx: int, sms: int, device: torch.device) -> Scratch:
        """Static tensors that `launch` needs; layers share those of one name."""
        ...

    def launch(self, projected: Tensor, mixed: Tensor, cache: Any, step: StepTensors) -> None:
        """The token at `step.position`: projected [1, P] → mixed [1, M], both float32, mixed striped."""
        ...


@dataclass(frozen=True)
class StepTensors:
    """Static tensors of the decode step that mixers read, and how they launch."""

    position: Tensor  # [1] int32; at `ctx` and beyond nothing is written
    status: Tensor  # [1] int32; other than 0 no state changes
    scratch: Mapping[str, Tensor]
    ctx: int
    sms: int  # multiprocessors, among which a context is split
    pdl: bool  # programmatic dependent launch
