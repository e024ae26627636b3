"""An opened model: its tensors by role, and the byte ranges of every record. Only headers are read here."""

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
from offmoe.errors import OffmoeError
from offmoe.kernels.planes import slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.machine.gc_pause import gc_paused
from offmoe.mixers.base import Names
from offmoe.models.config import ModelConfig
from offmoe.models.family import Family, Values
from offmoe.models.names import under_prefix
from offmoe.models.quantisation import assemble
from offmoe.models.read_config import read_config
from offmoe.models.tensors import check_trunk, expert_biases, find, holder, is_split, record_layout, transpose_experts


@dataclass(frozen=True)
class Model:
    """Checkpoint, family and config, with the layout of every layer's records.

    Records are numbered by moe_layer (see MoeConfig), tensors by layer.
    """

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig
    names: Names
    layouts: tuple[RecordLayout, ...]  # by moe_layer: Q4_K_M files mix formats

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: the largest record in its planes, rounded up to 256 so that every slot starts aligned."""
        return -(-max(slot_layout(layout).nbytes for layout in set(self.layouts)) // 256) * 256

    @property
    def records(self) -> int:
        return self.config.moe_layers * self.config.experts

    @property
    def record_bytes(self) -> int:
        """Bytes of all routed experts together."""
        return sum(layout.nbytes for layout in self.layouts) * self.config.experts

    @property
    def interleaved(self) -> bool:
        """Whether rotated pairs are neighbours in the rows of q and k."""
        return self.family.interleaved or (self.checkpoint.kind == "gguf" and self.family.interleaved_gguf)

    @property
    def tiled(self) -> bool:
        """Whether the value heads of DeltaNet are in llama.cpp's order."""
        return self.checkpoint.kind == "gguf" and self.family.tiled_gguf

    @property
    def record_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.config.hidden * self.config.moe.expert_hidden

    @property
    def split(self) -> bool:
        """Whether latent attention's kv_b is stored in two halves."""
        return is_split(self.checkpoint, self.names)

    def find(self, role: str, layer: int = 0, expert: int = 0) -> TensorInfo | None:
        """The tensor that plays `role`, or None."""
        return find(self.checkpoint, self.names, role, layer, expert)

    def stored(self, role: str, layer: int = 0) -> tuple[TensorInfo, Tensor | None]:
        """The tensor that holds `role`, and the indices of its rows there; None: all rows."""
        mixer = self.config.mixers[layer]
        there = holder(self.checkpoint, self.names, mixer, role, layer)
        info = self.find(there, layer)
        assert info is not None, f"{role} was there when the model was opened"
        return info, mixer.held_rows(role) if mixer.held.get(role) == there else None

    def weight_transform(self, role: str) -> Values | None:
        """Stored → effective weights (for example w + 1), or None for identity."""
        return None if self.checkpoint.kind == "gguf" else self.family.values.get(role)

    def ranges(self, moe_layer: int, expert: int) -> list[ByteRange]:
        """Byte ranges of a record's parts, in the order of its layout."""
        found = ((info, expert if info.matrices > 1 else 0) for info in self.parts(moe_layer, expert))
        return [r for info, number in found for r in info.ranges(number)]

    def parts(self, moe_layer: int, expert: int) -> list[TensorInfo]:
        """Tensors that hold a record's parts, in the order of its layout."""
        found = [self.find(part.name, self.config.routed[moe_layer], expert) for part in self.layouts[moe_layer].parts]
        return [info for info in found if info is not None]  # all were there when the model was opened

    def transposed(self, moe_layer: int) -> bool:
        """Whether records are transposed as they are read."""
        return any(info.row_major for info in self.parts(moe_layer, 0))

    def to_row_major(self, moe_layer: int, expert: int) -> Callable[[Bytes, Bytes], None]:
        """Function `(raw, record)` that makes a record of the bytes in its ranges."""
        return partial(row_major_record, self.parts(moe_layer, expert), self.layouts[moe_layer])

    def expert_biases(self, moe_layer: int) -> tuple[Tensor, Tensor]:
        """Biases of all experts of a layer, float32: gate and up concatenated [E, 2F], down [E, H]."""
        layer = self.config.routed[moe_layer]
        found = {
            role: torch.stack([self.checkpoint.tensor(info.name) for info in infos]).flatten(0, -2)
            for role, infos in expert_biases(self.checkpoint, self.names, self.config, layer).items()
        }
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
    """The model in an opened checkpoint. Raises OffmoeError."""
    family, config = read_config(checkpoint)
    names = family.gguf_names
    if checkpoint.kind == "safetensors":
        assemble(checkpoint)
        names = under_prefix(family.names, checkpoint.tensors)
        if family.transposed_experts:
            transpose_experts(checkpoint, names, config)
    names, config = with_head(checkpoint, names, config)
    check_trunk(checkpoint, names, config)
    layouts = tuple(record_layout(checkpoint, family, names, config, layer) for layer in config.routed)
    return Model(checkpoint, family, config, names, layouts)


def with_head(checkpoint: Checkpoint, names: Names, config: ModelConfig) -> tuple[Names, ModelConfig]:
    """Names and config with the output head that the file has, whatever tie_word_embeddings says, as in transformers 5.

    A head is used; where a tied model has nothing but its head, that is its embedding too.
    """
    head, embed = (find(checkpoint, names, role, 0, 0) for role in ("head", "embed"))
    if head is None and not config.stream.tied:
        raise OffmoeError(
            f"{checkpoint.path} has no tensor {names['head'][0]}, and its config does not say tie_word_embeddings: "
            "the file is incomplete or of another model"
        )
    if head is not None and embed is None and config.stream.tied:
        return {**names, "embed": names["head"]}, config
    return names, config.with_stream(tied=head is None)


def row_major_record(parts: Sequence[TensorInfo], layout: RecordLayout, raw: Bytes, record: Bytes) -> None:
    """Copy the parts in `raw` into `record`, those that are stored by columns transposed."""
    at = 0
    for info, part in zip(parts, layout.parts, strict=True):
        stored = raw[at : (at := at + sum(r.nbytes for r in info.ranges()))]
        rows = info.row_major(stored, info.name) if info.row_major else stored
        record[part.offset : part.offset + part.nbytes] = rows
