"""Every invalid input that a user may give, through the command line: a helpful line, and nothing left behind."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from checkpoint_files import gguf_bytes, gguf_string, model_directory, model_weights, rewritten, u32
from safetensors.torch import save_file

import offmoe
from offmoe.app.cli import main
from offmoe.checkpoint.find_model import DEMO
from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError
from offmoe.pack import ggml_library

Result = tuple[int, str, str]  # exit status, standard output, standard error
Command = Callable[..., Result]
ErrorLine = Callable[..., str]
FEW = ("--max-tokens", "3", "--greedy")


@pytest.fixture
def good(originals: Path) -> Path:
    return originals / "model.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid directory of safetensors, to be damaged."""
    return model_directory(tmp_path / "model")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `offmoe` in this process; an error that would print a traceback fails the test."""

    def call(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # CUDA leaves files open
        monkeypatch.setattr(sys, "argv", ["offmoe", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        status = main()
        return status, *capfd.readouterr()

    return call


def left() -> tuple[list[str], int, int]:
    """Return the open files, threads and children of this process."""
    return os.listdir("/proc/self/fd"), threading.active_count(), len(psutil.Process().children())


@pytest.fixture
def error_line(command: Command, tmp_path: Path) -> ErrorLine:
    """Return the error line of `offmoe`, which must leave no file, open file, thread or process behind."""

    def line(*arguments: object, status: int = 1, **named: Any) -> str:
        files, before = sorted(tmp_path.rglob("*")), left()
        result, out, err = command(*arguments, **named)
        assert (result, out) == (status, ""), err
        assert err.startswith("offmoe: ")
        assert err.index("\n") == len(err) - 1 < 700
        assert sorted(tmp_path.rglob("*")) == files
        assert left() == before
        return err.removeprefix("offmoe: ").rstrip("\n")

    return line


def both(error_line: ErrorLine, model: object) -> str:
    """Return the error line of `run` and `info`, which must be the same."""
    found = error_line("run", model, "hi")
    assert error_line("info", model) == found
    return found


def test_the_originals_are_good(command: Command, originals: Path, good: Path) -> None:
    """Otherwise every error below could have another reason."""
    for model in (originals / "model", good):
        status, out, err = command("run", model, "hi", *FEW, "--json")
        assert (status, err) == (0, "")
        assert len(json.loads(out)["tokens"]) == 3


# GGUF.


def place(data: bytes, name: str) -> int:
    """Return the offset after a tensor's name in the header."""
    return data.index(gguf_string(name)) + len(gguf_string(name))


def patched(name: str, dims: list[int] | None = None, kind: int | None = None, offset: int | None = None) -> Any:
    """Return a change of a GGUF: another shape (of the same rank), type number or offset of tensor `name`."""

    def change(data: bytes) -> bytes:
        at = place(data, name)
        (count,) = struct.unpack_from("<I", data, at)
        numbers = list(struct.unpack_from(f"<{count}QIQ", data, at + 4))
        numbers[:count] = dims or numbers[:count]
        numbers[count:] = [numbers[-2] if kind is None else kind, numbers[-1] if offset is None else offset]
        new = struct.pack(f"<{count}QIQ", *numbers)
        return data[: at + 4] + new + data[at + 4 + len(new) :]

    return change


HUGE = 1 << 62
Change = Callable[[bytes], bytes]
GGUF: dict[str, tuple[Change, str]] = {
    "empty": (lambda data: b"", "is not a GGUF file: it is empty: download it again"),
    "text": (lambda data: b"# A model\n", r"is not a GGUF file: it is a text of 10 bytes \('# A model'\)"),
    "noise": (lambda data: bytes(range(99)), r"it starts with b'\\x00\\x01\\x02\\x03', not b'GGUF'; give a \.gguf"),
    "HTML": (lambda data: b"<!DOCTYPE html>\n\n", r"it is a web page \(HTML\) in place of the file"),
    "a pickle": (lambda data: b"\x80\x02}q\x00.", "it is a pickle, which is never loaded"),
    "a pointer of git lfs": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "cut in the counts": (lambda data: data[:20], "is damaged: its header runs to byte 24 and the file ends at 20"),
    "cut in the metadata": (lambda data: data[:300], "its header runs to byte .* and the file ends at 300; copy"),
    "cut in the tensors": (lambda data: data[: place(data, "output.weight")], "its header runs to byte"),
    "cut in the weights": (lambda data: data[: len(data) // 2], "is truncated or damaged: tensor .* ends at byte .*;"),
    "cut by one byte": (lambda data: data[:-1], "is truncated or damaged"),
    "version": (lambda data: data[:4] + u32(77) + data[8:], "version 77: expected 2 or 3; convert"),
    "tensor count": (lambda data: data[:8] + struct.pack("<Q", HUGE) + data[16:], f"it claims {HUGE} tensors, more"),
    "key count": (lambda data: data[:16] + struct.pack("<Q", HUGE) + data[24:], f"it claims {HUGE} metadata keys"),
    "string length": (lambda data: data[:24] + struct.pack("<Q", HUGE) + data[32:], "its header runs to byte 4611686"),
    "offset outside": (patched("output.weight", offset=1 << 40), "tensor 'output.weight' ends at byte 1099"),
    "offset past 2^63": (patched("output.weight", offset=(1 << 64) - 32), "tensor 'output.weight' ends at byte 184"),
    "overlap": (patched("output.weight", offset=0), "tensors 'output.weight' and '.*' overlap|overlap"),
    "absurd shape": (patched("output.weight", dims=[HUGE, HUGE]), "tensor 'output.weight' ends at byte"),
    "shape of zero": (patched("output.weight", dims=[32, 0]), "tensor 'output.weight' is empty: expected weights"),
    "smaller shape": (patched("output.weight", dims=[32, 259]), r"has shape \[259, 32\]: the config asks for \[260"),
    "transposed shape": (patched("output.weight", dims=[260, 32]), r"has shape \[32, 260\]: the config asks for \[260"),
    "dtype": (patched("output.weight", kind=16), "is IQ2_XXS and has rows of 32 weights: expected a multiple of 256"),
    "integers": (patched("output.weight", kind=26), "'output.weight' has the format I32: expected one of F32, F16"),
    "unknown dtype": (patched("output.weight", kind=4242), "'output.weight' has the format number 4242"),
    "other dtype of one expert": (patched("blk.1.ffn_up_exps.weight", kind=2, dims=[32, 32, 3]), "has shape"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), GGUF.values(), ids=GGUF)
def test_damaged_gguf(error_line: ErrorLine, good: Path, tmp_path: Path, change: Change, message: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(change(good.read_bytes()))
    assert re.search(message, both(error_line, bad))


ARCH = "qwen3moe"
METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "quux"}, "'quux' is not supported; supported are deepseek2, dots1"),
    "no architecture": ({"general.architecture": ""}, "architecture '' is not supported"),
    "mamba": ({"general.architecture": "mamba2"}, "is a dense mamba2 model: offmoe runs mixture-of-experts models"),
    "dense": ({"general.architecture": "llama"}, "is a dense llama model: offmoe runs mixture-of-experts models"),
    "no experts": ({f"{ARCH}.expert_count": None}, "is a dense qwen3moe model"),
    "no layers": ({f"{ARCH}.block_count": None}, "the GGUF has no qwen3moe.block_count: it is"),
    "heads": ({f"{ARCH}.attention.head_count": 0}, "qwen3moe.attention.head_count = 0: expected a whole"),
    "text for a number": ({f"{ARCH}.embedding_length": "32"}, "qwen3moe.embedding_length = '32': expected"),
    "list for a number": ({f"{ARCH}.expert_count": [4, 4]}, r"qwen3moe.expert_count = \[4, 4\]: expected"),
    "top-k": ({f"{ARCH}.expert_used_count": 5}, "routes to 5 of 4 experts: more than there are"),
    "NaN": ({f"{ARCH}.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon = nan:"),
    "rope frequency": ({f"{ARCH}.rope.freq_base": 0.0}, "rope_theta is 0: expected at least 1"),
    "rope scaling": ({f"{ARCH}.rope.scaling.type": "spiral"}, "rope.scaling.type is 'spiral', and offmoe impl"),
    "part of the head": ({f"{ARCH}.rope.dimension_count": 8}, "rope.dimension_count is 8, and offmoe implements"),
    "more layers": ({f"{ARCH}.block_count": 3}, "has no tensor blk.2.attn_norm.weight: the file is incomplete"),
    "more experts": ({f"{ARCH}.expert_count": 5}, r"has shape \[4, 32\]: the config asks for \[5, 32\]"),
    "absurd layers": ({f"{ARCH}.block_count": 1 << 24}, "the config has 16777216 layers: no published model"),
    "split elsewhere": ({"split.count": 2}, "is one of 2 parts: expected a name such as model-00001-of-00003.gguf"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), METADATA.values(), ids=METADATA)
def test_gguf_of_another_kind(
    error_line: ErrorLine, good: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    assert re.search(message, both(error_line, rewritten(good, tmp_path / "bad.gguf", change)))


def test_gguf_without_a_tensor(error_line: ErrorLine, good: Path, tmp_path: Path) -> None:
    for name in ("blk.1.ffn_down_exps.weight", "blk.0.ffn_gate_inp.weight", "output_norm.weight"):
        bad = rewritten(good, tmp_path / f"{name}.gguf", **{name: None})
        assert f"has no tensor {name}: the file is incomplete" in both(error_line, bad)


def test_gguf_with_a_part_missing(error_line: ErrorLine, good: Path, tmp_path: Path) -> None:
    part = rewritten(good, tmp_path / "m-00001-of-00002.gguf", {"split.count": 2, "split.no": 0})
    assert "its directory lacks m-00002-of-00002.gguf: download them all" in both(error_line, part)


def test_weights_larger_than_any_memory(error_line: ErrorLine, tmp_path: Path) -> None:
    """A sparse file of 1 TiB, as large as its header says."""
    wide, attention, words = 1 << 20, 1 << 16, gguf_string("a") + gguf_string("b") + gguf_string("ab")
    keys = {"block_count": 1, "embedding_length": wide, "attention.head_count": 1, "expert_count": 2,
            "context_length": 128, "attention.layer_norm_rms_epsilon": 1,
            "attention.key_length": attention, "expert_used_count": 1, "expert_feed_forward_length": 32}  # fmt: skip
    shapes = {
        "token_embd": [wide, 3], "output_norm": [wide], "blk.0.attn_norm": [wide], "blk.0.ffn_norm": [wide],
        "blk.0.attn_q": [wide, attention], "blk.0.attn_k": [wide, attention], "blk.0.attn_v": [wide, attention],
        "blk.0.attn_output": [attention, wide], "blk.0.ffn_gate_inp": [wide, 2],
        "blk.0.ffn_gate_exps": [wide, 32, 2], "blk.0.ffn_up_exps": [wide, 32, 2],
        "blk.0.ffn_down_exps": [32, wide, 2],
    }  # fmt: skip
    entries, at = [], 0
    for name, dims in shapes.items():
        entries.append((f"{name}.weight", dims, 0, at))
        at += 4 * int(np.prod(dims))
    pairs = [("general.architecture", 8, gguf_string("llama")), ("tokenizer.ggml.model", 8, gguf_string("gpt2"))]
    pairs += [("tokenizer.ggml.tokens", 9, u32(8) + struct.pack("<Q", 3) + words)]
    pairs += [("tokenizer.ggml.merges", 9, u32(8) + struct.pack("<Q", 1) + gguf_string("a b"))]
    pairs += [(f"llama.{key}", 4, u32(value)) for key, value in keys.items()]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(gguf_bytes(pairs, entries, data=0))
    os.truncate(bad, bad.stat().st_size + at)
    assert "holds 0 expert slots" in both(error_line, bad)
    line = error_line("run", bad, "hi", "--vram", "100%")
    assert re.search(r"the plan needs 1\.\d+ TiB of memory and .* are free", line)


# safetensors.


def edit(path: Path, **values: Any) -> None:
    """Return a change of a JSON object; None removes a key."""
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def header(change: Callable[[dict[str, Any]], None]) -> Change:
    """Return a change of a safetensors header; the weights stay."""

    def rewrite(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        table = json.loads(data[8:end])
        change(table["lm_head.weight"])
        text = json.dumps(table).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return rewrite


SAFETENSORS: dict[str, tuple[Change, str]] = {
    "empty": (lambda data: b"", "model.safetensors is not a safetensors file: it is empty: download it again"),
    "cut in the length": (lambda data: data[:7], "is truncated: it has 7 bytes"),
    "cut in the header": (lambda data: data[:1000], "is truncated or not a safetensors file: it claims a header of"),
    "cut in the weights": (lambda data: data[: len(data) // 2], "is truncated or damaged: tensor .* ends at byte"),
    "cut by one byte": (lambda data: data[:-1], "is truncated or damaged: tensor .* ends at byte"),
    "header length": (lambda data: struct.pack("<Q", HUGE) + data[8:], f"it claims a header of {HUGE} bytes, the file"),
    "header too short": (lambda data: struct.pack("<Q", 100) + data[8:], "its header: not valid JSON"),
    "header of text": (lambda data: struct.pack("<Q", 4) + b"true", "its header: expected a JSON object, found bool"),
    "dtype": (header(lambda entry: entry.update(dtype="I32")), "has dtype 'I32': expected F32, F16, BF16"),
    "8 bits": (header(lambda entry: entry.update(dtype="F8_E5M2")), "takes 33280 bytes .*, and 8320 by its dtype"),
    "half the dtype": (header(lambda entry: entry.update(dtype="F16")), "33280 bytes at its data_offsets, and 16640"),
    "absurd shape": (header(lambda entry: entry.update(shape=[HUGE, HUGE])), "33280 bytes at its data_offsets, and 8"),
    "negative shape": (header(lambda entry: entry.update(shape=[-260, -32])), r"has the shape \[-260, -32\], expected"),
    "swapped shape": (header(lambda entry: entry.update(shape=[32, 260])), r"has shape \[32, 260\]: the config asks"),
    "offset outside": (header(lambda entry: entry.update(data_offsets=[1 << 40, (1 << 40) + 33280])), "ends at byte 1"),
    "overlap": (header(lambda entry: entry.update(data_offsets=[64, 33344])), "tensors .* overlap"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), SAFETENSORS.values(), ids=SAFETENSORS)
def test_damaged_safetensors(error_line: ErrorLine, folder: Path, tmp_path: Path, change: Change, message: str) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    assert re.search(message, both(error_line, folder))
    assert re.search(message, error_line("pack", folder, tmp_path / "out.gguf", "--format", "q8_0"))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "model_type": ({"model_type": "phi5"}, "'phi5' is not supported; supported are deepseek_v2, deepseek_v3"),
    "no model_type": ({"model_type": None}, "architecture 'None' is not supported; supported are deepseek_v2"),
    "model_type of lists": ({"model_type": [[]]}, "is not supported; supported are deepseek_v2"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and offmoe implements 'silu' or 'swish': this model"),
    "rope_scaling": ({"rope_scaling": {"type": "mrope", "factor": 4}}, "rope_type is 'mrope', and offmoe implements"),
    "rope_parameters": ({"rope_parameters": {"rope_type": ["a"]}}, r"rope_type is \['a'\], and offmoe implements"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "rope_type linear has no factor: expected by how much"),
    "rope_scaling of text": ({"rope_scaling": "yarn"}, "rope_scaling in the model's config is no table"),
    "attention_bias": ({"attention_bias": True}, "attention_bias is True, and offmoe implements False"),
    "mlp_only_layers": ({"mlp_only_layers": [9]}, r"mlp_only_layers = \[9\]: expected layers of 0 to"),
    "all dense": ({"mlp_only_layers": [0, 1], "intermediate_size": 32}, "none of the 2 layers has experts"),
    "dense": ({"mlp_only_layers": [0]}, "has no tensor model.layers.0.mlp.gate_proj.weight"),
    "dense by tensors": ({"mlp_only_layers": [0], "intermediate_size": 32}, "no tensor model.layers.0.mlp.gate_proj"),
    "decoder_sparse_step": ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0: expected a whole number of at least"),
    "layer_types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is 'sliding_attention'"),
    "partial_rotary_factor": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and offmoe implements 1"),
    "scoring_func": ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', and offmoe implements 'softmax'"),
    "n_group": ({"n_group": 8}, "n_group is 8, and offmoe implements 1"),
    "routed_scaling_factor": ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5, and offmoe implements 1"),
    "quantization_config": ({"quantization_config": {"quant_method": "hqq"}}, "quant_method is 'hqq', and offmoe"),
    "long quantization_config": ({"quantization_config": ["x" * 70] * 99}, "quant_method is ..xxx"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads = 0: expected a whole number of at least 1"),
    "negative": ({"num_hidden_layers": -2}, "num_hidden_layers = -2: expected a whole number"),
    "half a head": ({"num_attention_heads": 2.5}, "num_attention_heads = 2.5: expected a whole number"),
    "text for a number": ({"hidden_size": "32"}, "hidden_size = '32': expected a whole number"),
    "true for a number": ({"num_experts": True}, "num_experts = True: expected a whole number"),
    "huge": ({"vocab_size": 10**40}, "vocab_size = 1000.*: expected a whole number"),
    "missing": ({"num_experts_per_tok": None}, "the config routes to 8 of 4 experts: more than there are"),
    "top-k": ({"num_experts_per_tok": 5}, "routes to 5 of 4 experts: more than there are"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "2 heads do not divide among 3 key-value heads"),
    "odd head": ({"head_dim": 15}, "head_dim is 15: rotary embedding needs an even number"),
    "more heads than numbers": ({"num_attention_heads": 64, "head_dim": None}, "head_dim"),
    "NaN": ({"rms_norm_eps": float("nan")}, "config gives rms_norm_eps = nan:"),
    "infinite": ({"rope_theta": float("inf")}, "rope_theta = inf: expected a number"),
    "rope frequency": ({"rope_theta": 0}, "rope_theta is 0: expected at least 1"),
    "text for a float": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6': expected a number"),
    "text for a flag": ({"norm_topk_prob": "no"}, "norm_topk_prob = 'no': expected true or false"),
    "tied": ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': expected true or false"),
    "wider": ({"hidden_size": 64}, r"has shape \[260, 32\]: the config asks for \[260, 64\]"),
    "more layers": ({"num_hidden_layers": 3}, "has no tensor model.layers.2.input_layernorm.weight"),
    "more experts": ({"num_experts": 8}, r"has shape \[4, 32\]: the config asks for \[8, 32\]"),
    "wider experts": ({"moe_intermediate_size": 48}, r"has shape \[32, 32\]: the config asks for \[48, 32\]"),
    "absurd experts": ({"num_experts": 10**6}, "2 layers of 1000000 experts: no published model"),
    "ernie's biases": ({"model_type": "ernie4_5_moe", "use_bias": True},
                       "use_bias is True, and offmoe implements False"),
    "ernie's interval": ({"model_type": "ernie4_5_moe", "moe_layer_interval": 2},
                         "moe_layer_interval is 2, and offmoe"),
    "ernie's last": ({"model_type": "ernie4_5_moe", "moe_layer_end_index": 0}, "moe_layer_end_index is 0, and offmoe"),
    "ernie's shared": ({"model_type": "ernie4_5_moe", "moe_num_shared_experts": "2"},
                       "moe_num_shared_experts = '2': expected"),
    "linear attention": ({"model_type": "minimax_m2", "attn_type_list": [1, 0]}, "attn_type_list is 0, and offmoe"),
    "rotary_dim": ({"model_type": "minimax_m2", "rotary_dim": 10**6}, "partial_rotary_factor asks for 1000000 of 16"),
    "unequal layers": ({"model_type": "hunyuan_v1_moe", "moe_topk": [1, 2]},
                       r"moe_topk is \[1, 2\], and offmoe implements"),
    "no layers": ({"model_type": "hunyuan_v1_moe", "num_experts_per_tok": None, "moe_topk": []},
                  "config gives moe_topk = \\[\\]: expected"),
    "shared caches": ({"model_type": "hunyuan_v1_moe", "use_cla": True},
                      "use_cla is True, and offmoe implements False"),
    "alpha": ({"model_type": "hunyuan_v1_moe", "rope_scaling": {"type": "dynamic", "alpha": "a"}},
              "alpha = 'a': expected"),
    "no residual": ({"model_type": "granitemoe", "residual_multiplier": 0}, "residual stream or logits by 0: expected"),
    "two mscales": ({"model_type": "phimoe", "rope_scaling": {"type": "longrope", "short_mscale": 1, "long_mscale": 2}},
                    "short_mscale is 1 and long_mscale 2, and offmoe implements equal ones"),
    "three of a mixer": ({"model_type": "phimoe", "num_experts_per_tok": 3}, "num_experts_per_tok is 3, and offmoe"),
    "phi's weights": ({"model_type": "phimoe", "num_experts_per_tok": 2}, "norm_topk_prob is True, and offmoe"),
    "olmoe's norms": ({"model_type": "olmoe"}, r"q_norm.weight has shape \[16\]: the config asks for \[32\]"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_config_of_another_kind(error_line: ErrorLine, folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **change)
    assert re.search(message, both(error_line, folder))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 9999]
)
def test_config_that_is_no_object(error_line: ErrorLine, folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    assert re.search(r"config\.json: (not valid JSON|expected a JSON object)", both(error_line, folder))


def test_directories_that_lack_something(error_line: ErrorLine, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json: download the whole model directory" in both(error_line, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert "it holds pickle files, which are never loaded (pytorch_model.bin)" in both(error_line, folder)
    (tmp_path / "empty").mkdir()
    assert "has no model: expected model.safetensors, model.safetensors.index.json" in both(
        error_line, tmp_path / "empty"
    )


def sharded(folder: Path, **where: object) -> Path:
    """Split the weights into two shards; `where` names the shards of lm_head and of everything else."""
    tensors = model_weights()
    (folder / "model.safetensors").unlink()
    save_file({"lm_head.weight": tensors.pop("lm_head.weight")}, folder / "head.safetensors")
    save_file(tensors, folder / "rest.safetensors")
    places = {"head": "head.safetensors", "rest": "rest.safetensors", **where}
    weights = dict.fromkeys(tensors, places["rest"]) | {"lm_head.weight": places["head"]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return folder


INDICES = {
    "parent": ({"head": "../head.safetensors"}, r"points to '\.\./head\.safetensors': expected a \.safetensors file"),
    "root": ({"head": "/etc/head.safetensors"}, "points to '/etc/head.safetensors': expected a .safetensors file"),
    "pickle": ({"head": "head.bin"}, "points to 'head.bin': expected a .safetensors file in the same directory"),
    "number": ({"head": 1}, "points to 1: expected a .safetensors file"),
    "missing shard": ({"head": "gone.safetensors"}, "lacks 1 of 2 shards: 'gone.safetensors'"),
    "other shard": ({"head": "rest.safetensors"}, "lacks tensors that .* lists in it: 'lm_head.weight'"),
}  # fmt: skip


def test_shards_are_read(command: Command, folder: Path) -> None:
    assert command("run", sharded(folder), "hi", *FEW)[0] == 0


@pytest.mark.parametrize(("where", "message"), INDICES.values(), ids=INDICES)
def test_index_that_lies(error_line: ErrorLine, folder: Path, where: dict[str, object], message: str) -> None:
    assert re.search(message, both(error_line, sharded(folder, **where)))


def test_shard_that_is_cut(error_line: ErrorLine, folder: Path) -> None:
    os.truncate(sharded(folder) / "head.safetensors", 5000)
    assert re.search(r"head\.safetensors is truncated or damaged: tensor 'lm_head\.weight'", both(error_line, folder))


# Files other than weights: tokenizer, template, generation config, weights that are no numbers.


def test_missing_and_damaged_tokenizers(error_line: ErrorLine, folder: Path) -> None:
    file = folder / "tokenizer.json"
    whole = file.read_bytes()
    for text in (whole[: len(whole) // 2], b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'):
        file.write_bytes(text)
        assert "tokenizer.json cannot be read by the tokenizers library" in error_line("run", folder, "hi")
    file.unlink()
    assert "has no tokenizer.json: put the model's tokenizer files into" in error_line("run", folder, "hi")


GENERATION = {
    "text": ({"temperature": "hot"}, "temperature is 'hot'"),
    "negative": ({"top_p": -1}, "top_p is -1"),
    "NaN": ({"repetition_penalty": float("nan")}, "repeat_penalty is nan"),
    "half": ({"top_k": 2.5}, "top_k is 2.5"),
    "list": ({"min_p": [0.5]}, r"min_p is \[0.5\]"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "message"), GENERATION.values(), ids=GENERATION)
def test_generation_config(error_line: ErrorLine, folder: Path, values: dict[str, Any], message: str) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))
    line = error_line("run", folder, "hi")
    assert re.search(message, line)
    assert "generation_config.json" in line


@pytest.mark.parametrize("values", [["x"], [{"name": "default"}], 3, [3], [None], {"a": 1}])
def test_chat_template_that_is_no_text(command: Command, folder: Path, values: Any) -> None:
    """A model without a usable template accepts raw text."""
    edit(folder / "tokenizer_config.json", chat_template=values)
    assert command("run", folder, "hi", *FEW)[0] == 0


VOCABULARIES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"tokenizer.ggml.model": "no_vocab", "tokenizer.ggml.tokens": None, f"{ARCH}.vocab_size": 260},
             "has no tokenizer .*: use a GGUF that has one"),
    "unknown": ({"tokenizer.ggml.model": "bert"}, "tokenizer model 'bert' is not supported: expected gpt2, gemma4"),
    "numbers": ({"tokenizer.ggml.tokens": list(range(260))}, "tokens is missing or not a list of strings"),
    "twice": ({"tokenizer.ggml.tokens": ["a"] * 260}, "tokens has the same token twice: the file is damaged"),
    "types": ({"tokenizer.ggml.token_type": [1]}, "token_type does not match the 260 tokens"),
    "merges": ({"tokenizer.ggml.merges": ["h zz"]}, "the merge 'h zz' contains an unknown token"),
    "merge of one": ({"tokenizer.ggml.merges": ["h"]}, "the merge 'h' contains an unknown token"),
    "cut": ({"tokenizer.ggml.pre": "newest"}, "newest"),
    "scores": ({"tokenizer.ggml.model": "llama"}, "scores does not match the 260 tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), VOCABULARIES.values(), ids=VOCABULARIES)
def test_gguf_tokenizers(
    error_line: ErrorLine, good: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    assert re.search(message, error_line("run", rewritten(good, tmp_path / "bad.gguf", change), "hi"))


TEMPLATES = {
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", r"template fails \(SecurityError.*\): use plain"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch owned') }}", r"template fails \(SecurityError"),
    "format": ("{{ '{0.__class__}'.format(1) }}", "leaves out the last message"),  # an undefined value
    "change": ("{{ messages.append(1) }}", r"template fails \(SecurityError"),
    "endless": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not finish w"),
    "power": ("{{ 9 ** (9 ** 9) }}", "did not finish (within|in time)|template fails"),
    "memory": ("{{ 'a' * 10 ** 11 }}", r"template fails \(MemoryError\): use plain text"),
    "memory by doubling": ("{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}"
                           "{% endfor %}{{ n.s }}", "template fails|did not finish within"),
    "output": ("{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
               "its text is longer than 4194304 characters"),
    "import": ("{% import 'os' as os %}", "template fails"),
    "include": ("{% include '/etc/passwd' %}", "template fails"),
    "syntax": ("{% for %}", r"template fails \(TemplateSyntaxError in line 1"),
    "refusal": ("{{ raise_exception('only\npoems') }}", "the chat template rejects this conversation: only poems"),
    "escapes": ("{{ raise_exception('\x1b[2J') }}", r"rejects this conversation: \[2J"),
    "empty": ("{{ '' }}", "the chat template leaves out the last message"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message"), TEMPLATES.values(), ids=TEMPLATES)
def test_hostile_templates(
    error_line: ErrorLine, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = rewritten(good, tmp_path / "bad.gguf", {"tokenizer.chat_template": template})
    assert re.search(message, error_line("run", bad, "hi"))


def test_hostile_template_of_a_real_model(error_line: ErrorLine, tmp_path: Path) -> None:
    """Return the demo's file with a text replaced by another of the same length."""
    bad, data = tmp_path / "bad.gguf", DEMO.read_bytes()
    with open_checkpoint(DEMO) as checkpoint:
        template = checkpoint.metadata["tokenizer.chat_template"].encode()
    bad.write_bytes(data.replace(template, b"{{ self.__init__.__globals__ }}".ljust(len(template)), 1))
    assert re.search(r"chat template fails \(SecurityError.*\): use plain text", error_line("run", bad, "hi"))


@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.mlp.experts.3.down_proj", "model.layers.1.mlp.gate"])
def test_weights_that_are_no_numbers(error_line: ErrorLine, folder: Path, name: str) -> None:
    """A wrong answer would be worse than an error. The prompt routes to every expert."""
    weights = model_weights()
    weights[f"{name}.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors")
    for how in (("--greedy",), ("--temperature", "1"), ("--temperature", "1", "--top-k", "0")):
        line = error_line("run", folder, "the quick brown fox", "--raw", *how)
        assert line.startswith("the model answers with NaN: its weights are damaged")


def test_no_memory(error_line: ErrorLine, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("offmoe.trunk.host_trunk.Trunk.load_layers", fail)
    assert error_line("run", good, "hi") == "out of memory: lower --vram, --ram or --ctx"


# What stands on the command line.


def smallest(line: str) -> tuple[int, str]:
    """Return the bytes and the percentage that an error suggests."""
    found = re.search(r"the smallest that works is (\d+) bytes \(.*, ([\d.]+%)\)$", line)
    assert found, line
    return int(found[1]), found[2]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_slots_too_few_for_a_token(error_line: ErrorLine, command: Command, good: Path, scope: str) -> None:
    """Budget that the error suggests works, in bytes and as a share; one byte less does not."""
    for asked in ("0", "1", "1KiB", "1%"):
        least, share = smallest(error_line("run", good, "hi", "--vram", asked, "--scope", scope))
    assert smallest(error_line("info", good, "--vram", str(least - 1), "--scope", scope)) == (least, share)
    whole = command("run", good, "hi", *FEW)
    for enough in (str(least), share):
        assert command("run", good, "hi", *FEW, "--vram", enough, "--scope", scope, "--ram", "0") == whole


def test_slots_too_few_for_the_demo(error_line: ErrorLine, command: Command) -> None:
    least, share = smallest(error_line("info", "demo", "--vram", "1MiB"))
    assert smallest(error_line("info", "demo", "--vram", str(least - 1))) == (least, share)
    for enough in (least, share):
        assert command("info", "demo", "--vram", enough, "--json")[0] == 0


def test_little_free_memory(error_line: ErrorLine, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free in (0, 100_000):
        monkeypatch.setattr("offmoe.plan.free_ram", lambda free=free: free)
        least, _ = smallest(error_line("run", good, "hi"))
        line = error_line("run", good, "hi", "--vram", least)
        assert re.fullmatch("the plan needs .* of memory and .* are free: lower --vram, --ram or --ctx", line)


VALUES = {
    "--vram": {"0%": "'0%' is not a share: write a number above 0 and up to 100", "101%": "'101%' is not a share",
               "-5%": "'-5%' is not a share", "nan%": "'nan%' is not a share", "%": "'%' is not a share",
               "-1": "'-1' is not a size: write for example 8GiB", "8 parsecs": "'8 parsecs' is not a size",
               "": "'' is not a size", "1e9": "'1e9' is not a size", "9" * 30: "is larger than any memory"},
    "--ram": {"50%": "'50%' is not a size", "-1GiB": "'-1GiB' is not a size", "all": "'all' is not a size"},
    "--policy": {"best": "policy 'best' is unknown: choose lru, crf:h=1", "": "policy '' is unknown: choose lru",
                 "crf:h=0": "h is '0': write crf:h=1…4096", "crf:h=9999": "h is '9999': write crf:h=1…4096",
                 "crf:h=x": "h is 'x': write crf:h=1…4096", "crf:k=1": "has no parameter 'k': write crf:h=1…4096",
                 "lru:h=1": "has no parameter 'h': write lru", "crf:": "has no parameter '': write crf"},
    "--device": {"tpu": "device 'tpu' is unknown: write cpu, cuda or cuda:N", "cuda:x": "device 'cuda:x' is unknown",
                 "cuda:99": "was asked for and t", "cuda:99999999999": "device 'cuda:99999999999' is unknown"},
    "--ctx": {"15": "ctx is 15: expected a whole number, at least 16", "129": "--ctx 129 is more than the 128 pos",
              "9" * 30: "expected a whole number, at least 16 and below", "-1": "ctx is -1"},
    "--chunk": {"0": "chunk is 0: expected a whole number, at least 1"},
    "--temperature": {"nan": "temperature is nan: expected a number from 0 to 100", "-1": "temperature is -1.0",
                      "inf": "temperature is inf"},
    "--top-k": {"-1": "top_k is -1: expected a whole number, at least 0"},
    "--top-p": {"2": "top_p is 2.0: expected a number from 0 to 1", "nan": "top_p is nan", "-0.1": "top_p is -0.1"},
    "--min-p": {"2": "min_p is 2.0: expected a number from 0 to 1"},
    "--repeat-penalty": {"0": "repeat_penalty is 0.0: expected a number from 0.01 to 100", "nan": "is nan"},
    "--seed": {"-1": "seed is -1", str(2**64): f"seed is {2**64}: expected a whole number"},
    "--max-tokens": {"0": "max_tokens is 0: expected a whole number, at least 1"},
    "--stop": {"": "a stop string is empty"},
    "--system": {"\udcff": "the text has a lone surrogate (character 0), which is not valid Unicode"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [(name, value, message) for name, table in VALUES.items() for value, message in table.items()],
)
def test_impossible_values(error_line: ErrorLine, good: Path, option: str, value: str, message: str) -> None:
    assert message in error_line("run", good, "hi", f"{option}={value}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "demo", "hi", "--no-such"], "No such option '--no-such'"),
        (["info", "demo", "--greedy"], "No such option '--greedy'"),
        (["run", "demo", "hi", "there"], "unexpected extra argument"),
        (["run", "demo", "hi", "--ctx", "1.5"], "'1.5' is not a valid integer"),
        (["run", "demo", "hi", "--top-p", "most"], "'most' is not a valid float"),
        (["run", "demo", "hi", "--scope", "layers"], "'layers' is not one of 'layer', 'global'"),
        (["run", "demo", "hi", "--dtype", "f8"], "'f8' is not one of"),
        (["run", "demo", "hi", "--vram"], "requires an argument"),
        (["serve"], "No such command 'serve'"),
    ],
)
def test_usage(error_line: ErrorLine, arguments: list[str], message: str) -> None:
    line = error_line(*arguments, status=2)
    assert message in line
    assert "--help'." in line


def test_extreme_values_that_work(command: Command, good: Path) -> None:
    greedy = command("run", good, "hi", *FEW)
    assert greedy[0] == 0
    coldest = ["--temperature", "1e-320"], ["--temperature", "1", "--top-k", "1"], ["--top-p", "0"], ["--min-p", "1"]
    for values in coldest:
        assert command("run", good, "hi", "--max-tokens", "3", *values) == greedy
    for values in (["--seed", 2**63 - 1, "--top-k", 2**62], ["--repeat-penalty", "100"], ["--temperature", "100"]):
        assert command("run", good, "hi", "--max-tokens", "3", *values)[0] == 0


WHAT = "give a .gguf file, a directory of safetensors, a Hugging Face name (org/name or org/name:Q4_K_M), or demo"


@pytest.mark.parametrize("name", ["", "no.gguf", "/no/such/model", "~nobody-here/m.gguf", "a b", "https://host/a/b"])
def test_models_that_are_not_there(error_line: ErrorLine, name: str) -> None:
    for arguments in (["run", name, "hi"], ["info", name], ["chat", name], ["doctor", name], ["pack", name, "o.gguf"]):
        line = error_line(*arguments, *(["--format", "q8_0"] if "pack" in arguments else []))
        assert line == f"no model at {name!r}: {WHAT}"


def test_files_that_are_no_model(error_line: ErrorLine, folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "notes.txt").write_text("Once upon a time\n")
    assert "is not a regular file: give a .gguf file or a directory" in both(error_line, tmp_path / "pipe.gguf")
    assert "is not a regular file: give a .gguf file or a directory" in both(error_line, "/dev/null")
    assert "is not a regular file: give a .gguf file or a directory" in both(error_line, "/dev/zero")
    assert "folder.gguf has no model: expected model.safetensors" in both(error_line, tmp_path / "folder.gguf")
    assert "notes.txt is not a GGUF file: it is a text of 17 bytes ('Once upon a time')" in both(
        error_line, tmp_path / "notes.txt"
    )
    assert "config.json is not a GGUF file: it is JSON, not weights: give the model's directory" in both(
        error_line, folder / "config.json"
    )
    assert both(error_line, "x" * 300).endswith(": File name too long")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(error_line: ErrorLine, good: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked.gguf"
    locked.write_bytes(good.read_bytes())
    locked.chmod(0)
    assert both(error_line, locked) == f"cannot open {locked}: Permission denied"


def test_a_hub_name_without_a_network(tmp_path: Path) -> None:
    """Run in a process of its own: the hub's client reads the environment on import."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    program = [sys.executable, "-m", "offmoe", "run", "org/name:Q4_K_M", "hi"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=20, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("offmoe: org/name is not a local path and cannot be downloaded from the hub (")
    assert done.stderr.endswith("): check name and network\n")
    assert done.stderr.count("\n") == 1


# The prompt and the streams.


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"", "the prompt is empty: give PROMPT, or write it to standard input"),
        (b" \n\t\n", "the prompt is empty"),
        (b"caf\xe9", "standard input is not UTF-8: byte 0xe9 at offset 3"),
        (b"\xff\xfeh\x00i\x00", "standard input is not UTF-8, but UTF-16: convert it first"),
        ("é\n".encode() * 9 + b"\xe2\x82", "standard input is not UTF-8: byte 0xe2 at offset 27"),
        (b"hi " * 100, "the prompt needs 219 tokens and the context holds 128: shorten it, or start again"),
    ],
)
def test_prompts(error_line: ErrorLine, good: Path, stdin: bytes, message: str) -> None:
    assert message in error_line("run", good, stdin=stdin)


def test_prompt_on_the_command_line(error_line: ErrorLine, good: Path) -> None:
    assert "the prompt is empty" in error_line("run", good, "")
    assert "PROMPT is not UTF-8: byte 0xff at offset 2" in error_line("run", good, "hi\udcff")
    assert "the prompt needs 519 tokens" in error_line("run", good, "a" * 500)
    assert "needs 500 tokens and the context holds 64" in error_line("run", good, "a" * 500, "--raw", "--ctx", 64)


def test_invalid_utf8_in_a_chat(command: Command, good: Path) -> None:
    status, _, err = command("chat", good, *FEW, stdin=b"hi\nna\xefve\n")
    assert status == 1
    assert err.splitlines()[-1] == "offmoe: standard input is not UTF-8: byte 0xef at offset 5"


@pytest.mark.parametrize(("closed", "status"), [("<&-", 1), (">&-", 0), ("2>&-", 0)])
def test_closed_streams(good: Path, closed: str, status: int) -> None:
    prompt = "" if status else "hi"
    shell = f"exec '{sys.executable}' -m offmoe run '{good}' {prompt} --max-tokens 1 --greedy {closed}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=60, cwd=good.parent)
    assert (done.returncode, b"Traceback" in done.stderr) == (status, False)


# pack.


def test_pack_refuses(
    error_line: ErrorLine, folder: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    assert "format 'q3_x' is unknown: choose one of f32, f16" in error_line("pack", folder, out, "--format", "q3_x")
    assert "format '' is unknown" in error_line("pack", folder, out, "--format", "")
    assert "no is not a directory: create it first" in error_line(
        "pack", folder, tmp_path / "no/o.gguf", "--format", "f32"
    )
    assert "is already a GGUF: give a directory" in error_line("pack", good, out, "--format", "q8_0")
    assert "is already a GGUF" in error_line("pack", good, good, "--format", "q8_0", "--force")
    assert "exists: choose another name, or overwrite it with --force" in error_line(
        "pack", folder, good, "--format", "q8_0"
    )
    for target in (folder, folder / "model.safetensors", "/dev/null"):
        line = error_line("pack", folder, target, "--format", "q8_0", "--force")
        assert line.startswith(f"{target} ends with ")
        assert line.endswith(": expected .gguf")
    ggml_library.load_library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for fmt in ("q4_k", "Q5_K", "q6_k"):
        assert (
            error_line("pack", folder, out, "--format", fmt)
            == f"{fmt} needs ggml: install it with pip install 'offmoe[llama]'"
        )


def test_disk_full_while_packing(error_line: ErrorLine, folder: Path, tmp_path: Path) -> None:
    """No incomplete file remains, and an older file is unchanged."""
    out, (soft, hard) = tmp_path / "out.gguf", resource.getrlimit(resource.RLIMIT_FSIZE)
    for older in (None, b"older"):
        if older:
            out.write_bytes(older)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            line = error_line("pack", folder, out, "--format", "f32", "--force")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert re.fullmatch(rf"cannot write {out}, which takes .* KiB: File too large", line)
        assert (out.read_bytes() if older else None) == older


# Chats that were kept.


def said(role: str, content: object = "ho", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def kept(**changes: Any) -> bytes:
    """Return a chat as /save writes it, with `changes`."""
    turns = [said("user"), said("assistant", tokens=[1, 2])]
    return json.dumps({"offmoe_chat": 1, "model": "m", "system": None, "turns": turns, **changes}).encode()


CHATS = {
    "empty": (b"", "is not a chat written by /save: Expecting value"),
    "text": (b"hello", "is not a chat written by /save"),
    "no UTF-8": (kept(model="m\u00e9").replace(b"\\u00e9", b"\xe9"), "is not a chat written by /save"),
    "cut": (kept()[:-20], "is not a chat written by /save"),
    "deep": (b"[" * 100_000, "is not a chat written by /save"),
    "list": (b"[]", 'expected an object with "offmoe_chat": 1'),
    "version": (kept(offmoe_chat=2), 'expected an object with "offmoe_chat": 1'),
    "no model": (kept(model=None), "expected model, system and turns"),
    "system": (kept(system=["x"]), "expected model, system and turns"),
    "roles": (kept(turns=[said("assistant"), said("user")]), "message of role user"),
    "no text": (kept(turns=[said("user", 1), said("assistant")]), "content is not text"),
    "surrogate": (kept(turns=[said("user", "\ud800"), said("assistant")]), "surrogates not allowed"),
    "tokens": (kept().replace(b"[1, 2]", b"[1, 260]"), "tokens are not ids below 260"),
    "negative tokens": (kept().replace(b"[1, 2]", b"[-1]"), "tokens are not ids below 260"),
    "true": (kept().replace(b"[1, 2]", b"[true]"), "tokens are not ids below 260"),
}  # fmt: skip


def chat_error(command: Command, model: Path, text: str) -> str:
    """Return the line that ends a chat in a pipe, after the summary."""
    status, _, err = command("chat", model, *FEW, "--commands", stdin=text.encode())
    *_, line = err.splitlines()
    assert (status, err.count("offmoe: ")) == (1, 1), err
    return line.removeprefix("offmoe: ")


@pytest.mark.parametrize(("data", "message"), CHATS.values(), ids=CHATS)
def test_damaged_chats(command: Command, good: Path, tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "chat.json").write_bytes(data)
    line = chat_error(command, good, f"/load {tmp_path}/chat.json\n")
    assert f"{tmp_path}/chat.json is not a chat written by /save: " in line
    assert message in line


def test_a_good_chat_is_read(command: Command, good: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_bytes(kept())
    assert command("chat", good, *FEW, "--commands", stdin=f"/load {tmp_path}/chat.json\nhi\n".encode())[0] == 0


def test_files_that_are_no_chat(command: Command, good: Path, tmp_path: Path) -> None:
    assert "cannot read /no/such/chat: No such file" in chat_error(command, good, "/load /no/such/chat\n")
    assert "is not a chat written by /save" in chat_error(command, good, f"/load {good}\n")
    for path in ("/dev/null", tmp_path):  # as of /dev/zero, which never ends, and of pipes, which may never begin
        line = chat_error(command, good, f"/load {path}\n")
        assert line == f"{path} is not a chat written by /save: it is not a regular file"
    assert "cannot read ~nobody-here/x: No such file" in chat_error(command, good, "/load ~nobody-here/x\n")
    assert "cannot write /no/such/chat: No such file" in chat_error(command, good, "/save /no/such/chat\n")
    assert f"{tmp_path} is a directory: give the name of a file" in chat_error(command, good, f"/save {tmp_path}\n")
    assert "the file name is missing" in chat_error(command, good, "/load\n")
    assert "/fly is not a command: /help lists them" in chat_error(command, good, "/fly\n")
    assert "top_p is 7.0: expected a number from 0 to 1" in chat_error(command, good, "/set top_p 7\n")
    assert "/set has no option 'colour'" in chat_error(command, good, "/set colour red\n")


# From Python.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unknown_setting": 1}, "unknown setting 'unknown_setting': known are vram, ram, policy"),
        ({"vram": "0%"}, "'0%' is not a share"),
        ({"vram": -1}, "'-1' is not a size"),
        ({"ram": "much"}, "'much' is not a size"),
        ({"scope": "model"}, "scope 'model' is unknown: choose layer or global"),
        ({"dtype": "f8"}, "dtype 'f8' is unknown: choose f32 or bf16 or f16"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"device": 0}, "device 0 is unknown"),
        ({"policy": 3}, "policy 3 is unknown"),
        ({"ctx": "many"}, "ctx is 'many': expected a whole number"),
        ({"ctx": True}, "ctx is True: expected a whole number"),
        ({"chunk": 0.5}, "chunk is 0.5: expected a whole number"),
    ],
)
def test_settings_from_python(good: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OffmoeError) as caught:
        offmoe.load(str(good), **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([-1], {}, "a token id lies outside the model's vocabulary of 260"),
        ([260], {}, "a token id lies outside the model's vocabulary of 260"),
        ([{"role": "user"}], {}, "message 1 has a content of type NoneType"),
        ([{"role": "user", "content": ["x"]}], {}, "message 1 has a content of type list"),
        ("hi", {"temprature": 1}, "unknown setting 'temprature'"),
        ("hi", {"temperature": "hot"}, "temperature is 'hot': expected a number"),
        ("hi", {"top_k": 1.5}, "top_k is 1.5: expected a whole number"),
        ([1] * 128, {}, "the prompt needs 128 tokens and the context holds 128"),
    ],
)
def test_prompts_from_python(good: Path, prompt: Any, sampling: dict[str, Any], message: str) -> None:
    """Each gives an error before anything is generated, and the engine remains usable."""
    with offmoe.load(str(good), device="cpu") as engine:
        with pytest.raises(OffmoeError, match=re.escape(message)):
            engine.generate(prompt, **sampling)
        assert len(list(engine.generate([1], max_tokens=2, seed=0))) >= 1
