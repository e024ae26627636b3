"""An opened model: what its files hold and where each record lies. Nothing but headers is read here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from offmoe.checkpoint.base import ByteRange, Checkpoint, TensorInfo
from offmoe.checkpoint.open import open_checkpoint
from offmoe.checkpoint.row_major import Bytes
from offmoe.kernels.planes import slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.machine.gc_pause import gc_paused
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family, Names, Values
from offmoe.models.held import held_rows
from offmoe.models.quantisation import assemble
from offmoe.models.read_config import read_config
from offmoe.models.shapes import bias_shapes
from offmoe.models.tensors import check_trunk, find, holder, is_split, record_layout, transpose_experts


@dataclass(frozen=True)
class Model:
    """Checkpoint, family and config, with the layout of every layer's records.

    Records are numbered by place (see ModelConfig), tensors by layer.
    """

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig
    names: Names
    layouts: tuple[RecordLayout, ...]  # by place: Q4_K_M files mix formats

    @property
    def slot_bytes(self) -> int:
        """A slot holds the largest record in its planes, rounded up to 256 bytes so that every slot starts aligned."""
        return -(-max(slot_layout(layout).nbytes for layout in set(self.layouts)) // 256) * 256

    @property
    def records(self) -> int:
        return self.config.moe_layers * self.config.experts

    @property
    def record_bytes(self) -> int:
        """Of all routed experts together."""
        return sum(layout.nbytes for layout in self.layouts) * self.config.experts

    @property
    def interleaved(self) -> bool:
        """Whether the pairs that are rotated together lie side by side in q's and k's rows."""
        return self.family.interleaved or (self.checkpoint.kind == "gguf" and self.family.interleaved_gguf)

    @property
    def record_weights(self) -> int:
        return 3 * self.config.hidden * self.config.expert_hidden

    @property
    def split(self) -> bool:
        """Whether kv_b lies in two halves, see `latent_shapes`."""
        return is_split(self.checkpoint, self.names)

    def find(self, role: str, layer: int = 0, expert: int = 0) -> TensorInfo | None:
        """The tensor that plays `role`, or None."""
        return find(self.checkpoint, self.names, role, layer, expert)

    def stored(self, role: str, layer: int = 0) -> tuple[TensorInfo, Tensor | None]:
        """The tensor that `role` lies in, and which of its rows are meant; None: all."""
        there = "q" if role == "q_gate" else holder(self.checkpoint, self.names, role, layer)
        info = self.find(there, layer)
        assert info is not None, f"{role} was there when the model was opened"
        gated = self.config.output_gated and there == "q"
        return info, held_rows(role, self.config) if gated or there != role else None

    def weight_transform(self, role: str) -> Values | None:
        """What turns the numbers in the file into those that are computed with; None: they are."""
        return None if self.checkpoint.kind == "gguf" else self.family.values.get(role)

    def ranges(self, moe_layer: int, expert: int) -> list[ByteRange]:
        """Where the parts of a record lie, in the order of its layout."""
        found = ((info, expert if info.matrices > 1 else 0) for info in self.parts(moe_layer, expert))
        return [r for info, number in found for r in info.ranges(number)]

    def parts(self, moe_layer: int, expert: int) -> list[TensorInfo]:
        """The tensors that a record lies in, in the order of its layout."""
        found = [self.find(part.name, self.config.routed[moe_layer], expert) for part in self.layouts[moe_layer].parts]
        return [info for info in found if info is not None]  # all were there when the model was opened

    def transposed(self, moe_layer: int) -> bool:
        """Whether records are to be turned upright as they are read."""
        return any(info.row_major for info in self.parts(moe_layer, 0))

    def to_row_major(self, moe_layer: int, expert: int) -> Callable[[Bytes, Bytes], None]:
        """What makes a record of the bytes in its ranges: `turn(raw, record)`."""
        return partial(row_major_record, self.parts(moe_layer, expert), self.layouts[moe_layer])

    def expert_biases(self, moe_layer: int) -> tuple[Tensor, Tensor]:
        """Of all experts of a place, float32: gate beside up [E, 2F], down [E, H]."""
        layer = self.config.routed[moe_layer]
        found = {}
        for role in bias_shapes(self.names, self.config):
            info = self.find(role, layer)
            assert info is not None, f"{role} of layer {layer} was there when the model was opened"
            found[role] = self.checkpoint.tensor(info.name)
        if "gate_up_bias" in found:
            both = found["gate_up_bias"]
            gate, up = (both[:, ::2], both[:, 1::2]) if self.family.interleaved_experts else both.chunk(2, dim=1)
        else:
            gate, up = found["gate_bias"], found["up_bias"]
        return torch.cat((gate, up), dim=1), found["down_bias"]


def open_model(path: str | Path) -> Model:
    """Open a checkpoint and check that its tensors are those of its config. Raises OffmoeError."""
    with gc_paused():
        checkpoint = open_checkpoint(path)
        try:
            return described(checkpoint)
        except BaseException:
            checkpoint.close()
            raise


def described(checkpoint: Checkpoint) -> Model:
    family, config = read_config(checkpoint)
    names = family.gguf_names if checkpoint.kind == "gguf" else family.names
    if checkpoint.kind == "safetensors":
        assemble(checkpoint, family.translated(checkpoint.json("config.json") or {}).get("quantization_config"))
        if family.transposed_experts:
            transpose_experts(checkpoint, names, config)
    check_trunk(checkpoint, names, config)
    layouts = tuple(record_layout(checkpoint, family, names, config, layer) for layer in config.routed)
    return Model(checkpoint, family, config, names, layouts)


def row_major_record(parts: Sequence[TensorInfo], layout: RecordLayout, raw: Bytes, record: Bytes) -> None:
    """See Model.turn."""
    at = 0
    for info, part in zip(parts, layout.parts, strict=True):
        transposed = raw[at : (at := at + sum(r.nbytes for r in info.ranges()))]
        row_major = info.row_major(transposed, info.name) if info.row_major else transposed
        record[part.offset : part.offset + part.nbytes] = row_major
