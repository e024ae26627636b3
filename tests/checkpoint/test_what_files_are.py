"""A file or directory that is no model says what it is and what to give; one that is a model opens, however named."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    CONFIG,
    gguf_bytes,
    gguf_string,
    model_weights,
    rewritten,
    u32,
    write_gguf,
)
from safetensors.torch import save_file

from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError
from offmoe.models.model import open_model
from offmoe.text.tokenizer import load_tokenizer


def refusal(path: Path) -> str:
    """Return the one-line error of opening a model."""
    with pytest.raises(OffmoeError) as caught:
        open_model(path).checkpoint.close()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


def opens(path: Path) -> None:
    open_model(path).checkpoint.close()


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    """A copy of the model's directory, to be changed."""
    return Path(shutil.copytree(originals / "model", tmp_path / "model"))


def archived(write: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def tarred(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"))


def zipped(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.gguf", b"GGUF")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4976698672\n"
PLACEHOLDERS = {
    "LFS": (LFS, r"a pointer of Git LFS, not the file itself (of 4.63 GiB): run git lfs pull"),
    "old LFS": (b"version https://hawser.github.com/spec/v1\noid x\nsize 5\n", "a pointer of Git LFS"),
    "HTML": (b"<!DOCTYPE html><html><body>Entry not found</body></html>", "a web page (HTML) in place of the file"),
    "HTML after blanks": (b"\n\n  <html lang='en'>", "a web page (HTML)"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is XML, such as a server's error"),
    "JSON error": (b'{"error":"Repository not found"}', "an error of the server in place of the file ('Repository not"),
    "text": (b"Entry not found", "a text of 15 bytes ('Entry not found'), such as a server sends"),
    "zeros": (bytes(4096), "it begins with zeros, like a download under way"),
    "empty": (b"", "it is empty: download it again"),
}
WEIGHTS = {
    "gzip": (gzip.compress(b"GGUF" + bytes(99)), "it is compressed by gzip: unpack it first"),
    "tar": (archived(tarred), "it is a tar archive: unpack it first"),
    "zip": (archived(zipped), "it is a zip archive: unpack it first"),
    "npz": (archived(lambda buffer: np.savez(buffer, a=np.ones(2))), "it is a zip archive of NumPy arrays"),
    "npy": (archived(lambda buffer: np.save(buffer, np.ones(2))), "it is a NumPy array"),
    "torch": (archived(lambda buffer: torch.save({}, buffer)), "it is a pickle, which is never loaded"),
    "old torch": (
        archived(lambda buffer: torch.save({}, buffer, _use_new_zipfile_serialization=False)),
        "it is a pickle, which is never loaded",
    ),
    "GGML": (struct.pack("<I", 0x67676D6C) + bytes(99), "it is a GGML file of before GGUF"),
    "GGMF": (struct.pack("<I", 0x67676D66) + bytes(99), "it is a GGMF file of before GGUF"),
    "GGJT": (struct.pack("<I", 0x67676A74) + bytes(99), "it is a GGJT file of before GGUF"),
    "GGLA": (struct.pack("<I", 0x67676C61) + bytes(99), "it is a LoRA adapter of before GGUF"),
    "imatrix": (struct.pack("<II", 1, 19) + b"blk.0.attn_q.weight" + bytes(99), "an importance matrix (imatrix)"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "it is an HDF5 file"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "it is the index of a model's shards: give the directory"),
    "ollama": (
        b'{"schemaVersion":2,"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:0a1b"}]}',
        "it is a manifest of ollama: give the model's blob, sha256-0a1b",
    ),
    "prose": (b"# Model card\n" * 200, "it is a text that begins with '# Model card"),
}


@pytest.mark.parametrize(("data", "what"), [*PLACEHOLDERS.values(), *WEIGHTS.values()], ids=[*PLACEHOLDERS, *WEIGHTS])
def test_files_that_stand_in_for_weights(folder: Path, data: bytes, what: str) -> None:
    alone = folder.with_name("m.gguf")
    alone.write_bytes(data)
    assert what in refusal(alone)
    (folder / "model.safetensors").write_bytes(data)
    for path in (folder, folder / "model.safetensors"):
        assert what in refusal(path)
        assert "model.safetensors is not a safetensors file: " in refusal(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(("data", "what"), PLACEHOLDERS.values(), ids=PLACEHOLDERS)
def test_files_that_stand_in_for_json(folder: Path, name: str, data: bytes, what: str) -> None:
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / name).write_bytes(data)
    assert f"{name}: not valid JSON: " in refusal(folder)
    assert what in refusal(folder)


def test_each_format_under_the_name_of_the_other(originals: Path, folder: Path) -> None:
    """A GGUF is one under any name; safetensors need their config.json next to them."""
    for name in ("m.gguf", "m.GGUF", "m.bin", "m", "m.safetensors", "sha256-" + "f" * 64, "x.gguf.part"):
        opens(Path(shutil.copy(originals / "model.gguf", folder.with_name(name))))
    (folder / "model.safetensors").rename(folder / "model.gguf")
    opens(folder / "model.gguf")
    alone = folder.with_name("alone")
    alone.mkdir()
    (folder / "model.gguf").rename(alone / "model.gguf")
    assert "has no config.json: download the whole model directory" in refusal(alone / "model.gguf")


@pytest.mark.parametrize("name", ["x.gguf.part", "x.gguf.crdownload", "x.gguf.incomplete", "x.GGUF.aria2"])
def test_downloads_under_way(originals: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((originals / "model.gguf").read_bytes()[:40000])
    assert "its name says that the download is under way or was broken off: finish it" in refusal(tmp_path / name)
    (tmp_path / name).write_bytes(b"")
    (tmp_path / name).rename(tmp_path / "x.y.part")
    assert "; the download of x.y.part is under way or was broken off: finish it" in refusal(tmp_path)


def test_a_mark_of_a_download_next_to_the_file(originals: Path, folder: Path) -> None:
    path = folder.with_name("m.gguf")
    path.write_bytes((originals / "model.gguf").read_bytes()[:40000])
    path.with_name("m.gguf.aria2").touch()
    assert refusal(path).endswith(
        "; m.gguf.aria2 lies next to it, so its download is under way or was broken off: finish it"
    )
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40000])
    (folder / "model.safetensors.aria2").touch()
    assert "model.safetensors.aria2 lies next to it" in refusal(folder)


PIECES = {
    "part1of2": (["m.gguf.part1of2", "m.gguf.part2of2"], "m.gguf"),
    "split-a": (["m.gguf-split-a", "m.gguf-split-b", "m.gguf-split-c"], "m.gguf"),
    "eleven": ([f"m.gguf.part{number}" for number in range(1, 12)], "m.gguf"),
    "numbers": (["m.gguf.001", "m.gguf.002"], "m.gguf"),
    "letters": (["m.safetensors.aa", "m.safetensors.ab"], "m.safetensors"),
}


@pytest.mark.parametrize(("names", "whole"), PIECES.values(), ids=PIECES)
def test_pieces_that_have_to_be_joined(originals: Path, tmp_path: Path, names: list[str], whole: str) -> None:
    data = (originals / "model.gguf").read_bytes()
    size = -(-len(data) // len(names))
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(data[number * size : (number + 1) * size])
    command = f"it is one piece of a file that was cut: join all pieces in order (cat {' '.join(names)} > {whole})"
    for name in names:
        assert command in refusal(tmp_path / name)


def test_parts_of_a_split_gguf_joined_by_cat(tmp_path: Path) -> None:
    parts = []
    for number in range(2):
        path = tmp_path / f"m-{number + 1:05}-of-00002.gguf"
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 2}
        write_gguf(path, {f"t{number}": np.ones((1, 4), np.float32)}, **split)
        parts.append(path.read_bytes())
    for order in (parts, parts[::-1]):
        joined = tmp_path / "joined.gguf"
        joined.write_bytes(b"".join(order))
        assert "is made of the parts of a split GGUF, joined as by cat, which makes no GGUF" in refusal(joined)


KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "adapter": ({"general.type": "adapter"}, "blk.0.attn_q.weight.lora_a", "is a LoRA adapter, not a model"),
    "adapter without a type": ({}, "blk.0.attn_q.weight.lora_a", "is a LoRA adapter, not a model"),
    "imatrix": ({"general.type": "imatrix"}, "blk.0.attn_q.weight.in_sum2", "is an importance matrix (imatrix)"),
    "imatrix without a type": ({}, "blk.0.attn_q.weight.in_sum2", "is an importance matrix (imatrix)"),
    "mmproj": ({"general.type": "mmproj"}, "v.patch_embd.weight", "is a multimodal projector (mmproj)"),
    "clip": ({"general.architecture": "clip"}, "v.patch_embd.weight", "is a multimodal projector (mmproj)"),
    "control vector": ({"general.architecture": "controlvector"}, "direction.1", "is a control vector, not a model"),
    "vocabulary": ({"tokenizer.ggml.tokens": "a"}, "", "is a vocabulary without weights"),
    "nothing": ({}, "", "is without any tensor"),
    "type of tomorrow": ({"general.type": "dataset"}, "a", "is of general.type 'dataset', not a model"),
    "encoder": ({"general.architecture": "bert"}, "token_embd.weight", "is an encoder for embeddings"),
    "MoE encoder": ({"general.architecture": "nomic-bert-moe", "nomic-bert-moe.expert_count": 8}, "a", "is an encoder"),
    "image": ({"general.architecture": "flux"}, "img_in.weight", "is an image or video model"),
    "speech": ({"general.architecture": "wavtokenizer-dec"}, "a", "is a speech model"),
    "dense": ({"general.architecture": "qwen3"}, "token_embd.weight", "is a dense qwen3 model: offmoe runs mixture"),
    "dense llama": ({"general.architecture": "llama"}, "token_embd.weight", "is a dense llama model"),
    "experts of 0": (
        {"general.architecture": "qwen3moe", "qwen3moe.expert_count": 0},
        "a",
        "is a dense qwen3moe model",
    ),
    "other experts": ({"general.architecture": "arctic", "arctic.expert_count": 8}, "a", "'arctic' is not supported"),
    "unknown": ({"general.architecture": "quux"}, "token_embd.weight", "architecture 'quux' is not supported"),
}


def small_gguf(path: Path, metadata: dict[str, Any], *names: str) -> Path:
    """Write a GGUF of these keys, of strings or numbers, and a tensor of each name."""
    pairs = []
    for key, value in {"general.architecture": "qwen3moe", **metadata}.items():
        is_text = isinstance(value, str)
        pairs.append((key, 8 if is_text else 4, gguf_string(value) if is_text else u32(value)))
    entries = [(name, [32, 4], 0, 512 * number) for number, name in enumerate(filter(None, names))]
    path.write_bytes(gguf_bytes(pairs, entries, data=512 * len(entries)))
    return path


@pytest.mark.parametrize(("metadata", "tensor", "what"), KINDS.values(), ids=KINDS)
def test_kinds_of_gguf(tmp_path: Path, metadata: dict[str, Any], tensor: str, what: str) -> None:
    line = refusal(small_gguf(tmp_path / "m.gguf", metadata, tensor))
    assert what in line
    assert str(tmp_path / "m.gguf") in line or "not supported" in line


NEEDED = ("block_count", "embedding_length", "attention.head_count", "context_length", "expert_used_count")


@pytest.mark.parametrize("key", NEEDED)
@pytest.mark.parametrize("value", [None, "x", -1])
def test_a_key_that_is_missing_or_wrong_is_named_as_gguf_names_it(
    originals: Path, tmp_path: Path, key: str, value: object
) -> None:
    path = tmp_path / "m.gguf"
    if value == -1:
        data = (originals / "model.gguf").read_bytes()
        at = data.index(gguf_string(f"qwen3moe.{key}")) + len(gguf_string(f"qwen3moe.{key}")) + 4
        path.write_bytes(data[:at] + u32(0xFFFFFFFF) + data[at + 4 :])
    else:
        rewritten(originals / "model.gguf", path, {f"qwen3moe.{key}": value})
    line = refusal(path)
    assert f"qwen3moe.{key}" in line
    assert not any(f" {name}" in line for name in CONFIG)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({"model_type": "qwen3", "num_hidden_layers": 2, "architectures": ["Qwen3ForCausalLM"]}, "a dense qwen3"),
    "vision and dense": ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 2}}, "is a dense gemma3 model"),
    "encoder": ({"model_type": "bert", "num_hidden_layers": 2, "architectures": ["BertModel"]}, "is an encoder (bert)"),
    "reranker": ({"model_type": "xlm", "architectures": ["XLMForSequenceClassification"]}, "is an encoder (xlm)"),
    "speech": ({"model_type": "whisper", "is_encoder_decoder": True}, "is a speech model (whisper)"),
    "vision": ({"model_type": "siglip_vision_model", "num_hidden_layers": 2}, "is a vision model (siglip_vision"),
    "two halves": ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder with a decoder (t5)"),
    "adapter": ({"peft_type": "LORA", "base_model_name_or_path": "org/base"}, "is a LORA adapter"),
    "diffusers": ({"_class_name": "UNet2DConditionModel"}, "is a part of a diffusers pipeline"),
    "experts": ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, "architecture 'dbrx' is not supported"),
    "nothing": ({}, "architecture 'None' is not supported"),
}


@pytest.mark.parametrize(("config", "what"), CONFIGS.values(), ids=CONFIGS)
def test_kinds_of_config(folder: Path, config: dict[str, Any], what: str) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert what in refusal(folder)


# Directories.


def shards(folder: Path, *names: str) -> None:
    """Cut the weights of `folder` into files of these names, without an index."""
    (folder / "model.safetensors").unlink()
    tensors = sorted(model_weights().items())
    for number, name in enumerate(names):
        save_file(dict(tensors[number :: len(names)]), folder / name)


NUMBERED = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]


def test_shards_without_an_index(folder: Path) -> None:
    shards(folder, *NUMBERED)
    for path in (folder, *(folder / name for name in NUMBERED)):
        opens(path)
    (folder / NUMBERED[1]).unlink()
    for path in (folder, folder / NUMBERED[0]):
        assert f"lacks 1 of 3 shards: '{NUMBERED[1]}'; download them" in refusal(path)
    (folder / NUMBERED[1]).symlink_to("../../blobs/0123")
    assert f"lacks 1 of 3 shards: '{NUMBERED[1]}'" in refusal(folder)


def test_shards_without_numbers(folder: Path) -> None:
    shards(folder, "attention.safetensors", "experts.safetensors")
    opens(folder)
    save_file({"lm_head.weight": torch.ones(260, 32)}, folder / "other.safetensors")
    assert "has no index, and other.safetensors has the same tensors as another file ('lm_head.weight')" in refusal(
        folder
    )


def test_one_file_of_another_name(folder: Path) -> None:
    shards(folder, "tiny-moe.safetensors")
    opens(folder)
    opens(folder / "tiny-moe.safetensors")
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    save_file({"a": torch.ones(1)}, folder / "consolidated.safetensors")
    opens(folder)


def test_directories_with_several_gguf(originals: Path, tmp_path: Path) -> None:
    """Projectors, adapters and the like are no models, so that a model next to them is the only one."""
    shutil.copy(originals / "model.gguf", tmp_path / "Tiny-F32.gguf")
    for kind in ("mmproj", "adapter", "imatrix"):
        small_gguf(tmp_path / f"{kind}.gguf", {"general.type": kind}, "a")
        opens(tmp_path)
    (tmp_path / "Tiny-F32.gguf").rename(tmp_path / "mmproj-in-its-name.gguf")
    opens(tmp_path)
    shutil.copy(tmp_path / "mmproj-in-its-name.gguf", tmp_path / "z.gguf")
    assert "has 2 GGUF models: give one of mmproj-in-its-name.gguf, z.gguf" in refusal(tmp_path)
    for name in ("mmproj-in-its-name.gguf", "z.gguf"):
        (tmp_path / name).unlink()
    assert "is a LoRA adapter, not a model" in refusal(tmp_path)


def test_a_split_gguf_whose_first_part_is_missing(originals: Path, tmp_path: Path) -> None:
    keys = {"split.no": 1, "split.count": 2, "split.tensors.count": 9}
    rewritten(originals / "model.gguf", tmp_path / "m-00002-of-00002.gguf", keys)
    assert "its directory lacks m-00001-of-00002.gguf: download them all" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "weights", "model.GGUF", "m.gguf.download"])
def test_a_gguf_under_another_ending_in_a_directory(originals: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text("# A model\n")
    shutil.copy(originals / "model.gguf", tmp_path / name)
    opens(tmp_path)


def test_a_model_in_a_folder_of_the_directory(originals: Path, tmp_path: Path) -> None:
    """Given a repository in the hub's cache, the current snapshot is opened."""
    (tmp_path / ".git").mkdir()
    for name in ("Q4", "Q8"):
        (tmp_path / name).mkdir()
        shutil.copy(originals / "model.gguf", tmp_path / name / "m.gguf")
        if name == "Q4":
            opens(tmp_path)
    assert "has models in several folders: give one of " in refusal(tmp_path)
    hub = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(originals / "model", hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("b" * 40)
    with open_checkpoint(hub) as checkpoint:
        assert checkpoint.path.name == "b" * 40


def test_directories_that_hold_something_else(folder: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.lora_A.weight": torch.zeros(8, 64)}, lora / "adapter_model.safetensors")
    for path in (lora, lora / "adapter_model.safetensors"):
        assert "is a LORA adapter, not a model: give the base model org/base" in refusal(path)
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folder, pipeline / "transformer")
    (pipeline / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "is a diffusers pipeline (FluxPipeline), which makes images" in refusal(pipeline)


HELD = {
    "onnx": (["model.onnx"], "it holds ONNX files (model.onnx)"),
    "keras": (["tf_model.h5"], "it holds Keras or TensorFlow files"),
    "pickles": (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "which are never loaded"),
    "archive": (["model.tar.gz"], "it holds archives, which have to be unpacked"),
    "mistral": (["consolidated.safetensors", "params.json"], "is in Mistral's own format"),
    "config": (["config.json", "tokenizer.json"], "it holds config.json without weights: download them"),
    "other": (["README.md", "a.txt"], "; it holds README.md, a.txt"),
    "nothing": ([], "; it is empty"),
}


@pytest.mark.parametrize(("names", "what"), HELD.values(), ids=HELD)
def test_directories_without_a_model(tmp_path: Path, names: list[str], what: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00." if name.endswith(".bin") else b"#")
    assert "has no model: expected model.safetensors, model.safetensors.index.json or a .gguf; " in refusal(tmp_path)
    assert what in refusal(tmp_path)


def test_links_to_nothing(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.unlink()
    weights.symlink_to("../../blobs/0123")
    for path in (folder, weights):
        assert "it is a link to ../../blobs/0123, which is not there; download it again" in refusal(path)
    weights.rename(folder / "weights.bin")
    assert "; weights.bin is a link to a file that is not there" in refusal(folder)


# What nobody reads may be damaged.


DECORATIONS: dict[str, list[tuple[str, int, bytes]]] = {
    "description": [("general.description", 8, gguf_string(b"cut off h\xc3"))],
    "names": [("general.name", 8, gguf_string(b"caf\xe9")), ("general.author", 8, gguf_string(b"\xff\xfe"))],
    "name of a key": [("general.caf\xe9", 4, u32(1))],
    "tags": [("general.tags", 9, u32(8) + struct.pack("<Q", 2) + gguf_string("a") + gguf_string(b"\xe9"))],
    "another part": [("tokenizer.ggml.unread", 8, gguf_string(b"\xe9"))],
    "nested": [("general.lists", 9, u32(9) + struct.pack("<Q", 1) + u32(4) + struct.pack("<Q", 2) + bytes(8))],
    "twice": [("general.license", 8, gguf_string("a")), ("general.license", 8, gguf_string("b"))],
    "twice the same": [("general.alignment", 4, u32(32)), ("general.alignment", 4, u32(32))],
    "absurdly long": [("general.readme", 8, gguf_string(b"x" * (70 << 20)))],
}


@pytest.mark.parametrize("pairs", DECORATIONS.values(), ids=DECORATIONS)
def test_decorations(tmp_path: Path, pairs: list[tuple[str, int, bytes]]) -> None:
    """Nothing that is read comes after them by chance: the last key and the tensors are as they were."""
    path = tmp_path / "m.gguf"
    last = ("general.architecture", 8, gguf_string("llama"))
    path.write_bytes(gguf_bytes([*pairs, last]))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata["general.architecture"] == "llama"
        assert checkpoint.read("a").tolist() == list(range(32))


def test_halves_of_surrogate_pairs(folder: Path) -> None:
    """JSON can write what no text can hold; a special token of that name is none of the vocabulary's."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "\ud800", "\udfff": ["\ud83d"]}))
    with open_checkpoint(folder) as checkpoint:
        read = checkpoint.json("tokenizer_config.json")
        assert read is not None
        assert read["bos_token"] == "\ufffd"
        assert read["\ufffd"] == ["\ufffd"]
        load_tokenizer(checkpoint).close()


def test_decorations_of_json(folder: Path) -> None:
    """Bad bytes in a name of config.json and in safetensors' metadata; a byte order mark before JSON."""
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b'\xef\xbb\xbf{"_name_or_path": "caf\xe9", ' + config.removeprefix(b"{"))
    weights = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", weights)
    header = b'{"__metadata__": {"by": "caf\xe9"}, ' + weights[8 : 8 + length].removeprefix(b"{")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weights[8 + length :])
    opens(folder)
