"""float8 checkpoints with a scale for every 128 x 128 weights: experts are used as published, on every path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import float8_files
import pytest
import torch
from packed_files import packed
from quantised_checks import check_answers, check_stacked, check_tensors_refused, stack_experts
from reference import reference_of
from safetensors.torch import load_file, save_file
from tiny_engines import decoded, engine_of
from tiny_models import SHAPE
from wide_models import FAMILIES

from offmoe.errors import OffmoeError
from offmoe.models.model import open_model

IDS = torch.randint(3, 96, (20,), generator=torch.Generator().manual_seed(7)).tolist()
WIDE: dict[str, Any] = {
    **SHAPE, "hidden_size": 512, "num_key_value_heads": 4, "moe_intermediate_size": 256, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "intermediate_size": 384, "first_k_dense_replace": 1,
    "kv_lora_rank": 128, "q_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "n_group": 1, "topk_group": 1, "num_hidden_layers": 2, "initializer_range": 0.07,
}  # fmt: skip


ROUND = {"hidden_size": 512, "intermediate_size": 256, "moe_intermediate_size": 256,
           "shared_expert_intermediate_size": 256, "kv_lora_rank": 128, "q_lora_rank": 128}  # fmt: skip
OTHERS = {name: {key: ROUND.get(key, value) for key, value in numbers.items()} for name, numbers in FAMILIES.items()}


def made(
    folder: Path, powers: bool = True, kind: torch.dtype = torch.float32, family: str = "deepseek_v3"
) -> tuple[Path, Any]:
    """Save a model in float8; return it and transformers' model with the same values."""
    transformers, numbers = pytest.importorskip("transformers"), WIDE if family == "deepseek_v3" else OTHERS[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **numbers))
    path, plain = folder / "float8", folder / "plain"
    for where in (path, plain):
        model.float().eval().save_pretrained(where)
    save_file(float8_files.quantise(path, powers, kind), plain / "model.safetensors", {"format": "pt"})
    return path, transformers.AutoModelForCausalLM.from_pretrained(plain, dtype="float32").eval()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vram", "ram"), [("100%", "64MiB"), ("51%", 0)])
def test_logits_are_those_of_transformers(kind: torch.dtype, vram: str, ram: str | int, tmp_path: Path) -> None:
    path, model = made(tmp_path, powers=False, kind=kind)
    with engine_of(path, chunk=5, vram=vram, ram=ram) as engine:
        formats = {part.format for layout in engine.model.layouts for part in layout.parts}
        assert formats == {"F8_E4M3" if kind == torch.float32 else "F8_E4M3_BF16"}
        assert engine.model.layouts[0].nbytes == 3 * (512 * 256 + 8 * kind.itemsize)
        logits, _ = decoded(engine, IDS, prompt=8)
    reference_of(model, IDS).check_logits(logits, 7)


KINDS = [(torch.float8_e8m0fnu, True), (torch.uint8, True), (torch.float16, False)]


@pytest.mark.parametrize(("kind", "powers"), KINDS, ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["separate", "stacked"])
def test_other_types_of_scales_become_float32(kind: torch.dtype, powers: bool, stacked: bool, tmp_path: Path) -> None:
    """Exponents of two (UE8M0), as DeepSeek-V3.1's successors have them, also in bytes; float16."""
    path, model = made(tmp_path, powers=powers, kind=torch.float8_e8m0fnu if powers else kind)
    if kind == torch.uint8:
        tensors = load_file(path / "model.safetensors")
        bytes_of = {name: value.view(kind) for name, value in tensors.items() if value.dtype == torch.float8_e8m0fnu}
        save_file(tensors | bytes_of, path / "model.safetensors")
    if stacked:
        stack_experts(path)
    check_answers(path, IDS, reference_of(model, IDS), lambda formats: formats == {"F8_E4M3"})


@pytest.mark.parametrize("family", [name for name in OTHERS if name != "deepseek_v3"])
def test_other_families_tokens_are_the_same_at_every_budget(family: str, tmp_path: Path) -> None:
    path, model = made(tmp_path, powers=False, family=family)
    check_answers(path, IDS, reference_of(model, IDS), lambda formats: formats == {"F8_E4M3"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the graph itself")
def test_the_step_and_a_chunk_multiply_the_records_as_they_are(tmp_path: Path) -> None:
    """Scales are powers of two, which the trunk's bfloat16 represents exactly."""
    pytest.importorskip("triton")
    from interpreted_prefill import IDS as PROMPT_IDS
    from interpreted_prefill import prefill
    from interpreted_step import IDS as STEP_IDS
    from interpreted_step import run, step_of

    from offmoe.decode.variant import Variant

    path, model = made(tmp_path)
    with step_of(path, vram="60%") as step:
        reference_of(model, STEP_IDS).check_logits(run(step, Variant()))
    chunk = prefill(path, 4, 8, vram="60%")
    reference_of(model, PROMPT_IDS).check_logits(chunk)


def test_it_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces begin inside a tile."""
    monkeypatch.setattr("offmoe.pack.convert.PIECE", 50 * 512)
    path, model = made(tmp_path, powers=False)
    with engine_of(packed(path, tmp_path, "f32"), chunk=5) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    reference_of(model, IDS).check_logits(logits, 7)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_stacked_experts_are_the_same(kind: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.pack.convert.PIECE", 50 * 512)
    path, model = made(tmp_path, powers=False, kind=kind)
    check_stacked(path, tmp_path, IDS, reference_of(model, IDS))


def test_stacked_experts_of_odd_tiles_are_refused(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    stack_experts(path)
    name = "model.layers.1.mlp.experts.gate_up_proj"

    def shorten(tensors: dict[str, torch.Tensor], rows: int) -> None:
        scales = tensors[name + "_scale_inv"][:, : -(-rows // 128)]
        tensors |= {name: tensors[name][:, :rows].contiguous(), name + "_scale_inv": scales.contiguous()}

    check_tensors_refused(
        path, lambda t: shorten(t, 500), "expected F32 or BF16 for 500 rows and 512 columns, 128 of wh"
    )


def test_gate_and_up_that_share_a_tile_are_refused(tmp_path: Path) -> None:
    """`down`, whose columns are these rows, is not float8 with tiles."""
    path, _ = made(tmp_path)
    stack_experts(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 192}))

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        mlp = "model.layers.1.mlp."
        for name in [name for name in tensors if name.startswith(mlp) and ("down" in name or "shared" in name)]:
            del tensors[name]
        tensors[mlp + "experts.down_proj"] = torch.zeros(6, 512, 192)
        for part, shape in (("gate", (192, 512)), ("up", (192, 512)), ("down", (512, 192))):
            tensors[f"{mlp}shared_experts.{part}_proj.weight"] = torch.zeros(shape)
        both = mlp + "experts.gate_up_proj"
        tensors[both] = tensors[both][:, :384].contiguous()
        tensors[both + "_scale_inv"] = tensors[both + "_scale_inv"][:, :3].contiguous()

    check_tensors_refused(path, narrow, "stacks gate on up experts of 192 rows in F8_E4M3, of which 128 share")


def test_model_optimizer_s_tiles_have_four_dimensions(tmp_path: Path) -> None:
    path, model = made(tmp_path)
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    renamed = {name.removesuffix("_inv"): value[:, None, :, None].contiguous() if name.endswith("_inv") else value
               for name, value in tensors.items()}  # fmt: skip
    save_file(renamed, path / "model.safetensors")
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    (path / "config.json").write_text(json.dumps(config))
    check_answers(path, IDS, reference_of(model, IDS), lambda formats: formats == {"F8_E4M3"})


def test_compressed_tensors_name_tiles_otherwise(tmp_path: Path) -> None:
    path, _ = made(tmp_path, kind=torch.bfloat16)
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    before = open_model(path)
    save_file({name.removesuffix("_inv"): value for name, value in tensors.items()}, path / "model.safetensors")
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    said = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": weights}},
            "format": "float-quantized"}  # fmt: skip
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    assert open_model(path).layouts == before.layouts


def test_what_a_gpu_holds_is_counted(tmp_path: Path) -> None:
    from offmoe.models.parameters import count_weights

    path, _ = made(tmp_path)
    model = open_model(path)
    tensors = model.checkpoint.tensors.values()
    eighths = sum(i.range.nbytes for i in tensors if i.scales and ".experts." not in i.name)
    assert count_weights(model).unpacked_bytes == eighths > 0


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(NAME + "_scale_inv"), rf"{NAME}_scale_inv' is missing: expected F32 or BF16"),
    (lambda t: t.update({NAME + "_scale_inv": torch.ones(2, 3)}), r"is F32 \[2, 3\]: .* weights, \[2, 4\]"),
    (lambda t: t.update({NAME: torch.zeros(256, 512)}), r"keeps its up experts in F32 and F8_E4M3: expected one"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(OffmoeError, match=message):
        open_model(path)


@pytest.mark.parametrize("changes", [{"weight_block_size": [64, 64]}, {"fmt": "e5m2"}])
def test_another_quantisation_is_refused_by_name(changes: dict[str, Any], tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OffmoeError, match=f"quantization_config of fp8: {next(iter(changes))} is .* cannot be run yet"):
        open_model(path)
