"""An opened model: what its files hold and where each record lies. Nothing but headers is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from offmoe.checkpoint import ByteRange, Checkpoint, TensorInfo, open_checkpoint
from offmoe.checkpoint.upright import Bytes, Columns
from offmoe.errors import OffmoeError
from offmoe.garbage import collecting_no_garbage
from offmoe.kernels.formats import FORMATS
from offmoe.kernels.mla import Latent
from offmoe.kernels.planes import plane_sizes, slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.models.config import Heads, ModelConfig, from_gguf, from_hf
from offmoe.models.family import GGUF_NAMES, Family, Names, Values, family_of
from offmoe.models.held import HELD, held_rows, held_shape
from offmoe.models.keyless import mixer_shapes
from offmoe.models.latent import FLOATS
from offmoe.models.quantisation import assemble
from offmoe.models.rope import GGUF_FACTORS


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
        return self.config.places * self.config.experts

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

    def meant(self, role: str) -> Values | None:
        """What turns the numbers in the file into those that are computed with; None: they are."""
        return None if self.checkpoint.kind == "gguf" else self.family.values.get(role)

    def ranges(self, place: int, expert: int) -> list[ByteRange]:
        """Where the parts of a record lie, in the order of its layout."""
        found = ((info, expert if info.matrices > 1 else 0) for info in self.parts(place, expert))
        return [r for info, number in found for r in info.ranges(number)]

    def parts(self, place: int, expert: int) -> list[TensorInfo]:
        """The tensors that a record lies in, in the order of its layout."""
        found = [self.find(part.name, self.config.routed[place], expert) for part in self.layouts[place].parts]
        return [info for info in found if info is not None]  # all were there when the model was opened

    def lying(self, place: int) -> bool:
        """Whether records are to be turned upright as they are read."""
        return any(info.upright for info in self.parts(place, 0))

    def turn(self, place: int, expert: int) -> Callable[[Bytes, Bytes], None]:
        """What makes a record of the bytes in its ranges: `turn(raw, record)`."""
        return partial(turn_record, self.parts(place, expert), self.layouts[place])

    def expert_biases(self, place: int) -> tuple[Tensor, Tensor]:
        """Of all experts of a place, float32: gate beside up [E, 2F], down [E, H]."""
        layer = self.config.routed[place]
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


def turn_record(parts: Sequence[TensorInfo], layout: RecordLayout, raw: Bytes, record: Bytes) -> None:
    """See Model.turn."""
    at = 0
    for info, part in zip(parts, layout.parts, strict=True):
        lying = raw[at : (at := at + sum(r.nbytes for r in info.ranges()))]
        upright = info.upright(lying, info.name) if info.upright else lying
        record[part.offset : part.offset + part.nbytes] = upright


def open_model(path: str | Path) -> Model:
    """Open a checkpoint and check that its tensors are those of its config. Raises OffmoeError."""
    with collecting_no_garbage():
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
            turn_experts(checkpoint, names, config)
    check_trunk(checkpoint, names, config)
    layouts = tuple(record_layout(checkpoint, family, names, config, layer) for layer in config.routed)
    return Model(checkpoint, family, config, names, layouts)


def turn_experts(checkpoint: Checkpoint, names: Names, config: ModelConfig) -> None:
    """Stacked experts of floats, [E, cols, rows] in the file, are [E, rows, cols] from here on."""
    for role in ("gate_up", "down"):
        for layer in config.routed:
            info = find(checkpoint, names, role, layer, 0)
            if info and len(info.shape) == 3 and info.format in FLOATS and not info.upright:
                experts, cols, rows = info.shape
                turn = Columns(rows, cols, FORMATS[info.format].bytes)
                checkpoint.tensors[info.name] = replace(info, shape=(experts, rows, cols), upright=turn)


def read_config(checkpoint: Checkpoint) -> tuple[Family, ModelConfig]:
    if checkpoint.kind == "gguf":
        arch = checkpoint.metadata.get("general.architecture")
        family = family_of("arch", arch, gating(checkpoint, arch))
        if not checkpoint.metadata.get(f"{arch}.expert_count"):
            raise OffmoeError(f"{checkpoint.path} is a dense {arch} model: offmoe runs mixture-of-experts models")
        factors = checkpoint.tensor(GGUF_FACTORS).flatten().tolist() if GGUF_FACTORS in checkpoint.tensors else None
        return family, from_gguf(checkpoint.metadata, family, checkpoint.tensors, factors)
    raw = checkpoint.json("config.json")
    if raw is None:
        raise OffmoeError(f"{checkpoint.path} has no config.json: download the whole model directory")
    family = family_of("model_type", raw.get("model_type"))
    return family, from_hf(raw, family)


def gating(checkpoint: Checkpoint, arch: object) -> object:
    """expert_gating_func, which old files leave out: there it is a sigmoid (2) where a bias corrects the scores."""
    biased = any(name.endswith("exp_probs_b.bias") for name in checkpoint.tensors)
    return checkpoint.metadata.get(f"{arch}.expert_gating_func") or (2 if biased else 1)


def is_split(checkpoint: Checkpoint, names: Names) -> bool:
    return find(checkpoint, names, "k_b", 0, 0) is not None


def find(checkpoint: Checkpoint, names: Names, role: str, layer: int, expert: int) -> TensorInfo | None:
    for template in names.get(role, ()):
        if info := checkpoint.tensors.get(template.format(l=layer, e=expert)):
            return info
    return None


def trunk_shapes(config: ModelConfig, split: bool = False, layer: int = 0) -> dict[str, tuple[int, ...]]:
    """Role → shape, in `layer`, of everything that is no routed expert; `layers_of` says where. split: kv_b is."""
    heads = config.heads_of(layer)
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (config.vocab, config.hidden),
        "final_norm": (config.hidden,),
        "head": (config.vocab, config.hidden),
        "attn_norm": (config.hidden,),
        "o": (config.hidden, config.heads * config.value_dim if config.latent else heads.queries),
        "ffn_norm": (config.hidden,),
        "router": (config.experts, config.hidden),
    }
    shapes |= latent_shapes(config, config.latent, split) if config.latent else attention_shapes(config, heads)
    if config.tied:
        del shapes["head"]
    if config.o_bias:
        shapes["o_bias"] = (config.hidden,)
    if config.head_bias:
        shapes["head_bias"] = (config.vocab,)
    if config.norm_bias:
        shapes |= {f"{norm}_norm_bias": (config.hidden,) for norm in ("attn", "ffn", "final")}
    if config.rule.biased:
        shapes["router_bias"] = (config.experts,)
    if config.sinks:
        shapes["sinks"] = (config.heads,)
    if config.router_offset:
        shapes["router_offset"] = (config.experts,)
    if config.dense:
        shapes |= feed_forward_shapes("dense", config.hidden, config.dense_hidden)
    if config.shared:
        shapes |= feed_forward_shapes("shared", config.hidden, config.shared_hidden)
    if config.shared_gated:
        shapes["shared_router"] = (1, config.hidden)
    if config.sandwich:
        norms = ("attn_post_norm", "shared_norm", "shared_post_norm", "routed_post_norm", "ffn_post_norm")
        shapes |= {**dict.fromkeys((*norms, "router_gain"), (config.hidden,)), "layer_scale": (1,)}
    if config.rule.scaled:
        shapes["router_factors"] = (config.experts,)
    if config.mixer:
        shapes |= mixer_shapes(config.mixer, config.hidden)
    return shapes


def attention_shapes(config: ModelConfig, heads: Heads) -> dict[str, tuple[int, ...]]:
    q, kv = heads.queries, heads.keys
    rows = {"q": q + config.gate_rows, "k": kv, "v": kv}  # a head's query, then its gate
    shapes: dict[str, tuple[int, ...]] = {role: (count, config.hidden) for role, count in rows.items()}
    if config.qk_norm not in ("none", "unit"):
        norms = (heads.head_dim, heads.head_dim) if config.qk_norm in ("head", "after") else (q, kv)
        shapes |= {"q_norm": norms[:1], "k_norm": norms[1:]}
    if config.qkv_bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    return shapes


def latent_shapes(config: ModelConfig, z: Latent, split: bool) -> dict[str, tuple[int, ...]]:
    """Of kernels.mla. kv_b has a head's key and value rows together; split, those of its key are transposed."""
    heads, hidden = config.heads, config.hidden
    shapes: dict[str, tuple[int, ...]] = {"kv_a": (z.width, hidden), "kv_a_norm": (z.kv_rank,)}
    if z.q_rank:
        shapes |= {"q_a": (z.q_rank, hidden), "q_a_norm": (z.q_rank,), "q_b": (heads * z.key, z.q_rank)}
    else:
        shapes["q"] = (heads * z.key, hidden)
    if split:
        return shapes | {"k_b": (heads, z.kv_rank, z.plain), "v_b": (heads, z.value, z.kv_rank)}
    return shapes | {"kv_b": (heads * (z.plain + z.value), z.kv_rank)}


def feed_forward_shapes(kind: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Of a dense layer or of the shared experts: its roles are those of a record, with `kind` before them."""
    return {f"{kind}_gate": (inner, hidden), f"{kind}_up": (inner, hidden), f"{kind}_down": (hidden, inner)}


def layers_of(role: str, config: ModelConfig) -> Sequence[int]:
    """The layers in which a tensor plays `role`; only 0 where it belongs to none."""
    if "{l}" not in GGUF_NAMES[role][0]:
        return (0,)
    if role.startswith("dense"):
        return config.dense
    if role.startswith(("delta", "conv")):
        return config.keyless
    if role.partition("_")[0] in ("q", "k", "v", "o"):
        return config.attended
    return config.routed if role.startswith(("router", "shared")) else range(config.layers)


def trunk_roles(config: ModelConfig, split: bool = False) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(role, layer, shape) of everything that is no routed expert."""
    shapes = {config.heads_of(layer): trunk_shapes(config, split, layer) for layer in range(config.layers)}
    for role in next(iter(shapes.values())):
        yield from ((role, layer, shapes[config.heads_of(layer)][role]) for layer in layers_of(role, config))


def trunk_weights(config: ModelConfig) -> int:
    """Parameters of everything that is no routed expert."""
    return sum(prod(shape) for _, _, shape in trunk_roles(config))


def bias_weights(config: ModelConfig) -> int:
    """Of all routed experts; they stay beside the trunk, in float32, and count as the experts'."""
    return config.places * config.experts * (2 * config.expert_hidden + config.hidden) if config.expert_bias else 0


def trunk_tensors(model: Model) -> Iterator[TensorInfo]:
    """Everything that is used and no routed expert; files may hold more (layers that predict several tokens)."""
    found = (model.stored(role, layer)[0] for role, layer, _ in trunk_roles(model.config, model.split))
    yield from {info.name: info for info in found}.values()


def check_trunk(checkpoint: Checkpoint, names: Names, config: ModelConfig) -> None:
    for role, layer, shape in trunk_roles(config, is_split(checkpoint, names)):
        there = holder(checkpoint, names, role, layer)
        expect(checkpoint, names, there, layer, 0, shape if there == role else held_shape(there, config))
    if config.expert_bias:
        for layer in config.routed:
            for role, shape in bias_shapes(names, config).items():
                expect(checkpoint, names, role, layer, 0, shape)


def bias_shapes(names: Names, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Role → shape of the biases of all experts of a layer, stacked as its file has them."""
    experts, inner = config.experts, config.expert_hidden
    down = {"down_bias": (experts, config.hidden)}
    if "gate_up_bias" in names:
        return {"gate_up_bias": (experts, 2 * inner), **down}
    return {"gate_bias": (experts, inner), "up_bias": (experts, inner), **down}


def holder(checkpoint: Checkpoint, names: Names, role: str, layer: int) -> str:
    """The role of the tensor that `role` lies in: its own, or where it has none, one that holds others too."""
    other = HELD.get(role, role)
    alone = find(checkpoint, names, role, layer, 0) or not find(checkpoint, names, other, layer, 0)
    return role if alone else other


def expect(
    checkpoint: Checkpoint, names: Names, role: str, layer: int, expert: int, shape: tuple[int, ...]
) -> TensorInfo:
    """The tensor of that role; its shape must be `shape`."""
    info = find(checkpoint, names, role, layer, expert)
    if info is None:
        name = names[role][0].format(l=layer, e=expert)
        raise OffmoeError(f"{checkpoint.path} has no tensor {name}: the file is incomplete or of another model")
    if [n for n in info.shape if n > 1] != [n for n in shape if n > 1]:  # a single row may be written as a vector
        raise OffmoeError(f"tensor {info.name} has shape {list(info.shape)}: the config asks for {list(shape)}")
    return info


def record_layout(
    checkpoint: Checkpoint, family: Family, names: Names, config: ModelConfig, layer: int
) -> RecordLayout:
    """Check the experts of a layer and lay out their record: every expert must have the same formats."""
    wide, narrow = (config.expert_hidden, config.hidden), (config.hidden, config.expert_hidden)
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


@dataclass(frozen=True)
class Weights:
    """Parameters and bytes, counted from the files."""

    total: int
    active: int  # a token: everything but the experts that it is not routed to
    active_without_embedding: int  # some models leave the input embedding out of their own figure
    trunk_bytes: int  # of everything but the routed experts, in the file
    unpacked_bytes: int  # that a GPU holds beyond these: float8 in bfloat16


def count_parameters(config: ModelConfig) -> tuple[int, int, int]:
    """In total; active a token; of these without the input embedding, where that is not the head too."""
    c = config
    routed, resident = c.places * c.experts * 3 * c.hidden * c.expert_hidden + bias_weights(c), trunk_weights(c)
    active = resident + routed * c.top_k // c.experts
    return resident + routed, active, active - (0 if c.tied else prod(trunk_shapes(c)["embed"]))


def count_weights(model: Model) -> Weights:
    total, active, without_embedding = count_parameters(model.config)
    return Weights(
        total=total,
        active=active,
        active_without_embedding=without_embedding,
        trunk_bytes=sum(info.nbytes for info in trunk_tensors(model)) + 4 * bias_weights(model.config),
        unpacked_bytes=sum(info.range.nbytes for info in trunk_tensors(model) if FORMATS[info.format].tiled),
    )
