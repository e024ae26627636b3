"""`offmoe info --check` reads files whole: every kind of damage is found, and published peculiarities are none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import model_weights, rewritten, write_gguf
from click.testing import CliRunner
from safetensors.torch import save_file

from offmoe.app.check import Report, check
from offmoe.app.cli import cli
from offmoe.checkpoint.find_model import DEMO
from offmoe.checkpoint.open import open_checkpoint
from offmoe.checkpoint.scan import SCALES, not_numbers, zero_runs


def report(path: Path) -> Report:
    return check(path, lambda name, done, total: None)


def found(path: Path) -> dict[str, list[str]]:
    """Return the lines of a check by their kind."""
    kinds: dict[str, list[str]] = {}
    for finding in report(path).findings:
        assert "\n" not in finding.text
        kinds.setdefault(finding.kind, []).append(finding.text)
    return kinds


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "model", tmp_path / "model"))


def place(path: Path, name: str) -> tuple[Path, int, int]:
    """Return the file, offset and bytes of a tensor."""
    with open_checkpoint(path) as checkpoint:
        extent = checkpoint.tensors[name].range
        return checkpoint.files[extent.file], extent.offset, extent.nbytes


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_good_files_are_not_damaged(originals: Path) -> None:
    for path in (originals / "model", originals / "model.gguf", DEMO):
        assert not report(path).is_damaged
        assert report(path).bytes > 100_000
    assert "damaged" not in found(originals / "model")
    assert found(originals / "model").keys() <= {"guessed"}


EXPERT = {"model": "model.layers.1.mlp.experts.2.up_proj.weight", "model.gguf": "blk.1.ffn_up_exps.weight"}


@pytest.mark.parametrize("kind", EXPERT)
@pytest.mark.parametrize(("first", "nbytes"), [(0, 4096), (40, 2000), (1001, 3000), (2048, 2048)])
def test_holes_of_zeros(originals: Path, tmp_path: Path, kind: str, first: int, nbytes: int) -> None:
    path = tmp_path / kind
    (shutil.copytree if kind == "model" else shutil.copy)(originals / kind, path)
    file, offset, _ = place(path, EXPERT[kind])
    overwrite(file, offset + first, bytes(nbytes))
    (line,) = found(path)["damaged"]
    assert f"{EXPERT[kind]}' is zeros from byte " in line
    assert report(path).is_damaged


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_numbers(folder: Path, value: float, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in model_weights().items()}
    weights["model.norm.weight"][3] = value
    save_file(weights, folder / "model.safetensors")
    (line,) = found(folder)["damaged"]
    assert "model.safetensors: tensor 'model.norm.weight' has 1 values that are NaN or infinite" in line


@pytest.mark.parametrize("kind", SCALES)
def test_scales_of_every_block_format(kind: str) -> None:
    """The 16-bit scales are where gguf's dequantiser has them: infinite ones give values that are no numbers."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert SCALES[kind][0] == nbytes
    data = np.zeros(2 * nbytes, np.uint8)
    assert not_numbers(data, kind) == 0
    for at in SCALES[kind][1]:
        bad = data.copy()
        bad[nbytes + at : nbytes + at + 2] = np.frombuffer(np.float16("inf").tobytes(), np.uint8)
        assert not_numbers(bad, kind) == 1
        if kind != "Q8_1":  # an intermediate of ggml
            with np.errstate(invalid="ignore"):
                values = gguf.quants.dequantize(bad.reshape(1, -1), gguf.GGMLQuantizationType[kind])
            assert np.isfinite(values[:, :block]).all()
            assert not np.isfinite(values[:, block:]).all()


def test_runs_of_zeros_are_exact() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = rng.integers(1, 256, 6000, dtype=np.uint8)
        first, end = sorted(rng.integers(0, 6001, 2))
        data[first:end] = 0
        runs = [run for run in zero_runs(data) if run[1] - run[0] >= 1024]
        assert runs == ([(first, end)] if end - first >= 1024 else [])


def test_a_short_file(originals: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(originals / "model.gguf", tmp_path))
    os.truncate(path, path.stat().st_size - 100)
    (line,) = found(path)["damaged"]
    assert "is truncated or damaged: tensor " in line
    assert report(path).is_damaged


def test_checksums(originals: Path, folder: Path, tmp_path: Path) -> None:
    """By a blob's name in a cache, the note of `hf download --local-dir`, and files of sums."""
    weights = folder / "model.safetensors"
    right, wrong = hashlib.sha256(weights.read_bytes()).hexdigest(), "0" * 64
    note = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    places = (note, folder / "model.safetensors.sha256", folder / "SHA256SUMS")
    for file in places:
        for digest in (right, wrong):
            file.write_text(f"{digest}  model.safetensors\n")
            assert report(folder).is_damaged == (digest == wrong)
        assert f"has not the SHA-256 {wrong} that it should have" in found(folder)["damaged"][0]
        file.unlink()
    for digest in (right, wrong):
        weights.rename(tmp_path / digest)
        weights.symlink_to(tmp_path / digest)
        assert report(folder).is_damaged == (digest == wrong)
        shutil.copy(weights.resolve(), tmp_path / "whole")
        weights.unlink()
        (tmp_path / "whole").rename(weights)
    data = (originals / "model.gguf").read_bytes()
    blob = tmp_path / f"sha256-{hashlib.sha256(data).hexdigest()}"
    blob.write_bytes(data)
    assert not report(blob).is_damaged
    blob.rename(tmp_path / f"sha256-{wrong}")
    assert report(tmp_path / f"sha256-{wrong}").is_damaged


def test_json_of_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    data = (folder / "config.json").read_bytes()
    for content in (data, data.replace(b"{", b"{ ", 1)):
        blob = tmp_path / hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob.write_bytes(content)
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(blob)
        assert report(folder).is_damaged == (content != data)


def test_json_that_cannot_be_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text("<!DOCTYPE html>")
    assert any("generation_config.json: not valid JSON: it is a web page" in line for line in found(folder)["damaged"])


def test_tensors_that_nothing_reads(folder: Path) -> None:
    weights = model_weights()
    vision = {f"model.visual.blocks.{n}.attn.qkv.weight": torch.ones(4, 8) for n in range(3)}
    ahead = {f"model.layers.2.mlp.experts.{n}.up_proj.weight": torch.ones(4, 8) for n in range(4)}
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.full((8,), torch.inf) for n in range(2)}
    save_file({**weights, **vision, **ahead, **buffers}, folder / "model.safetensors")
    assert found(folder)["unread"] == [
        "model.layers.*.*: 4 tensors (F32), 512 B",
        "model.visual.*: 3 tensors (F32), 384 B",
        "model.layers.*.self_attn.rotary_emb.*: 2 tensors (F32), 64 B",
    ]
    assert not report(folder).is_damaged


def test_padding_is_no_hole(folder: Path) -> None:
    """Rows of unused tokens, biases of zero, and columns of zeros in every expert."""
    weights = model_weights()
    weights["lm_head.weight"][200:] = 0
    weights["model.embed_tokens.weight"][250:] = 0
    for name, tensor in weights.items():
        if "experts" in name and "down" in name:
            tensor[16:] = 0
    save_file(weights, folder / "model.safetensors")
    assert "damaged" not in found(folder)


def test_what_was_guessed(originals: Path, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"], config["rms_norm_eps"]
    (folder / "config.json").write_text(json.dumps(config))
    lines = found(folder)["guessed"]
    assert "config.json has no rms_norm_eps: 1e-06 is taken, the default of qwen3_moe" in lines
    assert any(line.startswith("config.json has no rope_theta: ") for line in lines)
    assert any(line.startswith("generation_config.json is missing") for line in lines)
    changes = dict.fromkeys(("qwen3moe.rope.freq_base", "tokenizer.ggml.pre", "tokenizer.chat_template"))
    lines = found(rewritten(originals / "model.gguf", tmp_path / "m.gguf", changes))["guessed"]
    assert "qwen3moe.rope.freq_base is missing: 10000.0 is taken as base of RoPE" in lines
    assert any("tokenizer.ggml.pre" in line for line in lines)
    assert "the files have no chat template: a chat is not possible, only run --raw" in lines


def test_models_that_cannot_be_run(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "dense.gguf", {"token_embd.weight": np.full((64, 64), np.nan, np.float32)})
    kinds = found(path)
    assert "is a dense llama model" in kinds["cannot run"][0]
    assert "has 4096 values that are NaN or infinite" in kinds["damaged"][0]


def test_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    done = runner.invoke(cli, ["info", str(folder), "--check"], standalone_mode=False)
    assert done.return_value == 0
    assert done.output.splitlines()[-1].startswith(f"{folder}: nothing damaged, 1 file read, ")
    overwrite(*place(folder, "lm_head.weight")[:2], np.float32("nan").tobytes())
    done = runner.invoke(cli, ["info", str(folder), "--check", "--json"], standalone_mode=False)
    assert done.return_value == 1
    numbers: dict[str, Any] = json.loads(done.output)
    assert numbers["findings"][0]["kind"] == "damaged"

    def interrupted(path: Path, progress: Any) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr("offmoe.app.check.check", interrupted)
    done = runner.invoke(cli, ["info", str(folder), "--check"], standalone_mode=True)
    assert done.exit_code in (1, 130)
