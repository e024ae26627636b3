"""Where the description of a quantisation may stand, and what it may say that changes no weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from int4_files import saved_int4
from scaled_files import saved_scaled
from tiny_engines import decoded, engine_of
from torch import Tensor
from wide_models import IDS

from offmoe.errors import OffmoeError
from offmoe.models.model import open_model

Config = dict[str, Any]
SCALED = ("modelopt nvfp4", "modelopt fp8", "nvfp4-pack-quantized", "float-quantized")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """Return a quantised directory by its kind, and its logits with the description in its usual place."""
    found: dict[str, tuple[Path, Tensor]] = {}

    def of(kind: str) -> tuple[Path, Tensor]:
        if kind not in found:
            saved = saved_scaled if kind in SCALED else saved_int4
            path, _ = saved(tmp_path_factory.mktemp("told"), kind)
            found[kind] = path, logits(path)
        return found[kind]

    return of


def logits(path: Path) -> Tensor:
    with engine_of(path, dtype="f32") as engine:
        return decoded(engine, IDS, prompt=8)[0]


def elsewhere(path: Path, folder: Path, config: Config, files: dict[str, Config]) -> Path:
    """The same weights with another config.json and other files next to it."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(path / "model.safetensors")
    for name, value in {"config.json": config, **files}.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def parts_of(path: Path) -> tuple[Config, Config]:
    """config.json without its quantization_config, and that."""
    config = json.loads((path / "config.json").read_text())
    return config, config.pop("quantization_config")


def in_text(config: Config, quantised: Config, name: str) -> tuple[Config, dict[str, Config]]:
    return {**config, "text_config": {**config, name: quantised}}, {}


PLACES: dict[str, Callable[[Config, Config], tuple[Config, dict[str, Config]]]] = {
    "compression_config": lambda config, q: ({**config, "compression_config": q}, {}),
    "text_config": lambda config, q: in_text(config, q, "quantization_config"),
    "compression_config in text_config": lambda config, q: in_text(config, q, "compression_config"),
    "inside itself": lambda config, q: (
        {**config, "quantization_config": {"quant_method": "compressed-tensors", "quantization_config": q}}, {}),
    "without its method": lambda config, q: (
        {**config, "quantization_config": {k: v for k, v in q.items() if k != "quant_method"}}, {}),
    "null, and elsewhere": lambda config, q: ({**config, "quantization_config": None, "compression_config": q}, {}),
    "nowhere": lambda config, q: (config, {}),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_places_in_a_config(place: str, made: Callable[[str], tuple[Path, Tensor]], tmp_path: Path) -> None:
    """The tensors of compressed-tensors alone say enough."""
    path, want = made("packed")
    assert torch.equal(logits(elsewhere(path, tmp_path / "m", *PLACES[place](*parts_of(path)))), want)


GPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
        "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model"}  # fmt: skip
FILES: dict[str, tuple[str, str, Config]] = {
    "AutoGPTQ": ("gptq", "quantize_config.json", GPTQ),
    "AutoGPTQ, asymmetric": ("gptq, asymmetric", "quantize_config.json", {**GPTQ, "sym": False, "group_size": 64}),
    "GPTQModel": ("gptq_v2", "quantize_config.json", {
        "bits": 4, "group_size": -1, "desc_act": False, "sym": False, "lm_head": False, "quant_method": "gptq",
        "checkpoint_format": "gptq_v2", "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:4.0.0"]}}),
    "AutoAWQ": ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}),
    "AWQ, nowhere": ("awq", "nothing.json", {}),
    "Model Optimizer": ("modelopt nvfp4", "hf_quant_config.json", {
        "producer": {"name": "modelopt", "version": "0.31.0"}, "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}}),
    "Model Optimizer, nowhere": ("modelopt fp8", "nothing.json", {}),
}  # fmt: skip


@pytest.mark.parametrize("writer", FILES)
def test_files_beside_a_config(writer: str, made: Callable[[str], tuple[Path, Tensor]], tmp_path: Path) -> None:
    kind, file, table = FILES[writer]
    path, want = made(kind)
    config, _ = parts_of(path)
    assert torch.equal(logits(elsewhere(path, tmp_path / "m", config, {file: table})), want)


def test_gptq_without_a_description_is_refused(made: Callable[[str], tuple[Path, Tensor]], tmp_path: Path) -> None:
    """Zero points may be stored less one or not, which no tensor says."""
    path, _ = made("gptq")
    with pytest.raises(OffmoeError, match=r"neither config.json nor quantize_config.json says how: .*download"):
        open_model(elsewhere(path, tmp_path / "m", parts_of(path)[0], {}))


def test_a_stray_description_beside_floats(tmp_path: Path) -> None:
    from checkpoint_files import model_directory

    path = model_directory(tmp_path / "m")
    want = logits(path)
    (path / "quant_config.json").write_text('{"quant_method": "of another program"}')
    assert torch.equal(logits(path), want)


OBSERVER = {"observer": "mse", "observer_kwargs": {"maxshrink": 0.2}, "block_structure": None, "scale_dtype": None}
SPARSITY = {"format": "dense", "global_sparsity": 0.143, "ignore": ["lm_head"], "registry_requires_subclass": False,
            "sparsity_structure": "unstructured", "targets": []}  # fmt: skip
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INNOCENT: dict[str, tuple[str, Config]] = {
    "sparsity of format dense": ("packed", {"sparsity_config": SPARSITY}),
    "sparsity left open": ("packed", {"sparsity_config": {}}),
    "no transforms": ("packed", {"transform_config": {"config_groups": {}}}),
    "status": ("packed", {"quantization_status": "frozen", "global_compression_ratio": 1.6, "version": "0.13.1.a2"}),
    "cache": ("packed", {"kv_cache_scheme": CACHE}),
    "left out": ("packed", {"ignore": ["lm_head", "re:.*mlp.gate$", "model.layers.0.mlp.shared_expert_gate"]}),
    "cache and producer": ("modelopt nvfp4", {"kv_cache_quant_algo": "FP8", "producer": {"name": "modelopt"},
                                              "exclude_modules": ["lm_head", "*.mlp.gate"]}),
    "modelopt_fp4": ("modelopt nvfp4", {"quant_method": "modelopt_fp4"}),
    "weights alone": ("modelopt nvfp4", {"quant_algo": "W4A16_NVFP4"}),
    "smoothed into norms": ("modelopt nvfp4", {"quant_algo": "NVFP4_AWQ", "pre_quant_scale": True,
                                               "has_zero_point": False}),
    "layers apart": ("modelopt nvfp4", {"quant_algo": "MIXED_PRECISION", "quantized_layers": {
        "model.layers.0.mlp.experts.0.up_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "mtp.fc": {"quant_algo": "NVFP4_SVD"}}}),
    "schemes of activations": ("modelopt fp8", {"config_groups": {"group_0": {"input_activations": CACHE}}}),
    "per row": ("float-quantized", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "gptq's own": ("gptq", {"damp_percent": 0.05, "true_sequential": True, "act_group_aware": True, "lm_head": False,
                            "format": "gptq", "meta": {"quantizer": ["gptqmodel:2.0"]}, "pack_dtype": "int32",
                            "dynamic": {"-:.*gate$": {}, "+:.*down": {"bits": 4, "group_size": 32}}}),
    "groups of another size, as the tensors have them": ("gptq", {"group_size": 64}),
    "awq's own": ("awq", {"backend": "autoawq", "do_fuse": False, "modules_to_not_convert": ["gate"], "version": "GEMM",
                          "exllama_config": {"version": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("what", INNOCENT)
def test_what_changes_no_weight_is_accepted(
    what: str, made: Callable[[str], tuple[Path, Tensor]], tmp_path: Path
) -> None:
    kind, fields = INNOCENT[what]
    path, want = made(kind)
    config, quantised = parts_of(path)
    both = {**config, "quantization_config": {**quantised, **fields}}
    assert torch.equal(logits(elsewhere(path, tmp_path / "m", both, {})), want)


@pytest.mark.parametrize("kind", ["packed", "nvfp4-pack-quantized", "float-quantized"])
def test_observers_activations_and_other_groups_change_nothing(
    kind: str, made: Callable[[str], tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """A group of a format that offmoe lacks may be of modules that no role needs, such as an MTP layer's."""
    path, want = made(kind)
    config, quantised = parts_of(path)
    (group,) = quantised["config_groups"].values()
    group["weights"] = {**OBSERVER, **group["weights"]}
    group |= {"input_activations": {**CACHE, "dynamic": "local", "num_bits": 4}, "output_activations": CACHE}
    other = {"targets": ["re:.*mtp.*"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
             "format": "int-quantized"}  # fmt: skip
    quantised["config_groups"] = {"group_0": other, "group_1": {"targets": ["Linear"], "input_activations": CACHE},
                                  "group_2": {**group, "format": quantised["format"]}}  # fmt: skip
    both = {**config, "quantization_config": quantised}
    assert torch.equal(logits(elsewhere(path, tmp_path / "m", both, {})), want)


REFUSED: dict[str, tuple[str, Config, str]] = {
    "sparse": ("packed", {"sparsity_config": {**SPARSITY, "format": "sparse-24-bitmask"}},
               "the format of sparsity_config is 'sparse-24-bitmask', and offmoe implements 'dense'"),
    "rotated": ("packed", {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config is"),
    "low rank": ("modelopt nvfp4", {"quant_algo": "NVFP4_SVD"}, "quant_algo is 'NVFP4_SVD', and offmoe implements"),
    "a method": ("awq", {"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', and offmoe implements"),
    "no method": ("awq", {"quant_method": None}, "quant_method is None, and offmoe implements"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_changes_weights_is_refused_by_field(
    what: str, made: Callable[[str], tuple[Path, Tensor]], tmp_path: Path
) -> None:
    kind, fields, message = REFUSED[what]
    path, _ = made(kind)
    config, quantised = parts_of(path)
    both = {**config, "quantization_config": {**quantised, **fields}}
    with pytest.raises(OffmoeError, match=message):
        open_model(elsewhere(path, tmp_path / "m", both, {}))
