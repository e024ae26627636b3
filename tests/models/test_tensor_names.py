"""Names of tensors that other writers give: every family opens under all, with the same weights in every role."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from exhaustive import cases
from safetensors.torch import load_file, save_file
from tiny_engines import IDS, decoded, engine_of
from tiny_models import FAMILIES, TELLING, reference, saved
from torch import Tensor

from offmoe.models.model import Model, open_model
from offmoe.models.names import HEADS, PREFIXES
from offmoe.models.shapes import trunk_roles

Tensors = dict[str, Tensor]
Renaming = Callable[[str], str]
LAYER = r"(model\.layers\.\d+\.)"
BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
PLAIN = [family for family in FAMILIES if "-" not in family]


def prefixed(name: str, prefix: str) -> str:
    return name.replace("model.", prefix, 1) if name.startswith("model.") else name


def in_block(name: str, block: str, first: str) -> str:
    """The part with experts under another name; other parts of a layer keep theirs."""
    routed = r"(experts\.|gate\.weight|router\.weight|gate\.e_score|e_score_correction_bias)"
    return re.sub(LAYER + first + r"\." + routed, rf"\1{block}.\2", name)


def spelled(name: str, parts: dict[str, str]) -> str:
    """Experts' matrices under other names."""
    found = re.search(r"\.experts\.\d+\.(\w+)\.weight", name)
    return name.replace(f".{found[1]}.", f".{parts[found[1]]}.") if found and found[1] in parts else name


def router_called(name: str, other: str) -> str:
    return re.sub(LAYER + r"(\w+)\.(gate|router)\.weight$", rf"\1\2.{other}.weight", name)


def with_suffix(name: str) -> str:
    """Stacked experts as modules have them."""
    return re.sub(r"(\.experts\.(gate_up|down)_proj)$", r"\1.weight", name)


def renamings(family: str) -> Iterator[tuple[str, Renaming]]:
    for prefix in PREFIXES[1:]:
        yield f"prefix {prefix!r}", partial(prefixed, prefix=prefix)
    for prefix in HEADS[1:]:
        yield f"head {prefix!r}", lambda name, prefix=prefix: prefix + name if name.startswith("lm_head") else name
    if family == "gemma4_text":
        yield "moe.experts", lambda name: re.sub(LAYER + r"experts\.", r"\1moe.experts.", name)
        return
    yield "w1", partial(spelled, parts=PARTS)
    yield "gate_proj", partial(spelled, parts={theirs: ours for ours, theirs in PARTS.items()})
    yield "suffix", with_suffix
    for first in BLOCKS:
        for block in BLOCKS:
            if first != block and family != "gpt_oss":  # its biases stand there too
                yield f"{block} for {first}", partial(in_block, block=block, first=first)
    for other in ("gate", "router"):
        yield f"router called {other}", partial(router_called, other=other)


CASES = [(family, fused) for family in PLAIN for fused in (False, True)]


def contents(model: Model) -> dict[tuple[str, int], bytes]:
    """Bytes of every role and of every expert, by layer."""
    found = {}
    for role, layer, _ in trunk_roles(model.config, model.split):
        info = model.stored(role, layer)[0]
        found[role, layer] = model.checkpoint.tensor(info.name).float().numpy().tobytes()
    for place in range(model.config.moe_layers):
        for expert in range(model.config.experts):
            raw = torch.cat([model.checkpoint.read_range(part) for part in model.ranges(place, expert)])
            record = torch.empty_like(raw)
            model.to_row_major(place, expert)(raw.numpy(), record.numpy())
            found[f"expert {expert}", place] = record.numpy().tobytes()
        if model.config.moe.expert_bias:
            both, down = model.expert_biases(place)
            found["biases", place] = torch.cat((both, down), dim=1).numpy().tobytes()
    return found


@pytest.mark.parametrize(("family", "fused"), CASES)
def test_every_role_has_the_same_weights_under_all_names(family: str, fused: bool, tmp_path: Path) -> None:
    path = saved(family, tmp_path, fused)
    file = path / "model.safetensors"
    tensors = load_file(file)
    with open_model(path).checkpoint:
        want = contents(open_model(path))
    for what, renamed in renamings(family):
        other = {renamed(name): tensor for name, tensor in tensors.items()}
        if other.keys() == tensors.keys():
            continue
        save_file(other, file, {"format": "pt"})
        model = open_model(path)
        with model.checkpoint:
            assert contents(model) == want, what


@pytest.mark.parametrize("family", cases(PLAIN, [family for family in TELLING if family in PLAIN]))
def test_logits_are_the_same_under_other_names(family: str, tmp_path: Path) -> None:
    """Everything renamed at once."""
    path = saved(family, tmp_path)
    tensors = load_file(path / "model.safetensors")
    for what, renamed in renamings(family):
        if what in ("prefix 'language_model.model.'", "w1", "block_sparse_moe for mlp", "head 'language_model.'"):
            tensors = {renamed(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with engine_of(path) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    reference(family, IDS).check_logits(logits, 7)
