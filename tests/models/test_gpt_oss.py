"""What only gpt-oss's files have: blocks and scales in tensors of their own, and what its config may not ask for."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_files import packed
from tiny_models import reference, saved

from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.models.model import open_model
from offmoe.settings import Settings

IDS = [5, 17, 3, 60, 9, 33, 2, 71, 14, 8]
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def rewritten(path: Path, change: Any) -> Path:
    """With `change` done to its tensors by name."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


def test_blocks_and_scales_may_lie_in_different_shards(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved("gpt_oss", tmp_path)
    tensors, shards = load_file(path / "model.safetensors"), ("one.safetensors", "two.safetensors")
    for second, shard in enumerate(shards):
        save_file({n: t for n, t in tensors.items() if n.endswith("_blocks") == bool(second)}, path / shard)
    index = {name: shards[name.endswith("_blocks")] for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "model.safetensors").unlink()
    with Engine(open_model(path), Settings.of(device="cpu", ctx=64, vram="60%")) as engine:
        assert len({r.file for r in engine.model.ranges(0, 0)}) == 2
        reference("gpt_oss", IDS).check_logits(engine.prefill(IDS)[None], -1)


TENSORS: dict[str, tuple[Any, str]] = {
    "no scales": (lambda t: t.pop(f"{GATE_UP}_scales"), "gate_up_proj_blocks' has dtype 'U8': expected F32"),
    "no blocks": (lambda t: t.pop(f"{GATE_UP}_blocks"), "gate_up_proj_scales' has dtype 'U8': expected F32"),
    "other scales": (lambda t: t.update({f"{GATE_UP}_scales": torch.zeros(6, 64, 3, dtype=torch.uint8)}),
                     r"gate_up_proj_scales' is U8 \[6, 64, 3\]: expected U8 or F8_E8M0 \[6, 64, 2\]"),
    "no sinks": (lambda t: t.pop("model.layers.2.self_attn.sinks"), "has no tensor model.layers.2.self_attn.sinks"),
    "no expert bias": (lambda t: t.pop(f"{GATE_UP}_bias"), f"has no tensor {GATE_UP}_bias"),
    "wide down bias": (lambda t: t.update({"model.layers.0.mlp.experts.down_proj_bias": torch.zeros(6, 65)}),
                       r"down_proj_bias has shape \[6, 65\]: the config asks for \[6, 64\]"),
    "fewer experts": (lambda t: t.update({f"{GATE_UP}_{part}": t[f"{GATE_UP}_{part}"][:5].clone()
                                          for part in ("blocks", "scales")}),
                      r"gate_up_proj has shape \[5, 64, 64\]: the config asks for \[6, 64, 64\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    change, message = TENSORS[name]
    with pytest.raises(OffmoeError, match=message):
        open_model(rewritten(saved("gpt_oss", tmp_path), change))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "kind of a layer": ({"layer_types": ["sliding_attention", "chunked_attention"] * 2}, "layer_types is 'chunked_att"),
    "kinds of too few": ({"layer_types": ["full_attention"]}, "gives 1 layer_types: expected one for each of 4 layers"),
    "no window": ({"sliding_window": None}, "has no sliding_window"),
    "quantisation": ({"quantization_config": {"quant_method": "hqq"}}, "quant_method is 'hqq', and .*mxfp4"),
    "no bias": ({"attention_bias": False}, "attention_bias is False, and offmoe implements True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and offmoe implements 'silu'"),
    "limit": ({"swiglu_limit": "seven"}, "swiglu_limit = 'seven': expected a number"),
    "rope": ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type is 'proportional', and offmoe implements"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_ask_for_more_are_refused(name: str, tmp_path: Path) -> None:
    change, message = CONFIGS[name]
    path = saved("gpt_oss", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(OffmoeError, match=message):
        open_model(path)


def test_experts_of_floats_that_lie_column_by_column_are_turned_as_they_are_read(tmp_path: Path) -> None:
    """Whole records in RAM, and out of a tier that is too small; in the step as on the CPU."""
    path, answers = saved("gpt_oss", tmp_path, fused=True), []
    for vram, ram in (("100%", "64MiB"), ("51%", 0)):
        with Engine(open_model(path), Settings.of(device="cpu", ctx=64, vram=vram, ram=ram)) as engine:
            assert engine.model.transposed(0)
            list(engine.generate(IDS, temperature=0.0, max_tokens=16))
            answers.append(engine.answer_tokens)
    assert answers[0] == answers[1]
    if torch.cuda.is_available() or not find_spec("triton"):
        return
    from interpreted_step import IDS as STEP_IDS
    from interpreted_step import run, step_of

    from offmoe.decode.variant import Variant

    with step_of(path, vram="60%") as step:
        reference("gpt_oss", STEP_IDS).check_logits(run(step, Variant()))


def apart(tensors: dict[str, torch.Tensor]) -> None:
    """Each expert by itself, as tools that quantise write them: gate's and up's rows no longer alternate."""
    for name, whole, part, kind in popped(tensors):
        for expert, one in enumerate(whole):
            rows = {"gate": one[::2], "up": one[1::2]} if part == "gate_up" else {"down": one}
            tensors |= {f"{name}.{expert}.{each}_proj.{kind}": row.contiguous() for each, row in rows.items()}


def modules(tensors: dict[str, torch.Tensor]) -> None:
    """Each expert a module in one of two lists, rows as they were."""
    for name, whole, part, kind in popped(tensors):
        tensors |= {f"{name}.{part}_projs.{expert}.{kind}": one.contiguous() for expert, one in enumerate(whole)}


def popped(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, str, str]]:
    """Take out the stacks of experts: what stands in front of their names, rows first, part, weight or bias."""
    found = []
    for name in [name for name in tensors if ".experts." in name]:
        base, _, part = name.rpartition(".")
        kind = "bias" if part.endswith("_bias") else "weight"
        whole = tensors.pop(name)
        found.append((base, whole if kind == "bias" else whole.mT, part.partition("_proj")[0], kind))
    return found


@pytest.mark.parametrize("change", [apart, modules])
def test_experts_apart_with_their_biases(change: Any, tmp_path: Path) -> None:
    path = rewritten(saved("gpt_oss", tmp_path, fused=True), change)
    for file in (path, packed(path, tmp_path, "f32")):
        with Engine(open_model(file), Settings.of(device="cpu", ctx=64, vram="60%")) as engine:
            reference("gpt_oss", IDS).check_logits(engine.prefill(IDS)[None], -1)
