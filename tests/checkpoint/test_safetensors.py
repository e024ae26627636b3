"""safetensors: our reader agrees with the library; every damaged directory gives a one-line error."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import entry, safetensors_bytes
from safetensors.torch import save_file

from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def error_line(path: Path) -> str:
    """Return the one-line error of opening `path`."""
    with pytest.raises(OffmoeError) as caught:
        open_checkpoint(path).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_dtype_and_shape_reads_as_it_was_written(tmp_path: Path) -> None:
    want = {
        f"{dtype}{len(shape)}".removeprefix("torch."): torch.randn(shape).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for shape in ((), (5,), (3, 4), (2, 3, 4))
    }
    save_file(want, tmp_path / SINGLE, metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.kind == "safetensors"
        assert checkpoint.metadata == {}
        assert checkpoint.tensors.keys() == want.keys()
        for name, tensor in want.items():
            got = checkpoint.tensor(name)
            assert got.dtype == torch.float32
            assert got.shape == tensor.shape
            assert torch.equal(got, tensor.float()), name
            assert torch.equal(checkpoint.tensor(name, tensor.dtype), tensor)


GOOD = entry()
DAMAGED = {
    "empty": (b"", "is not a safetensors file: it is empty: download it again"),
    "short": (b"\x01\x02\x03", "is truncated: it has 3 bytes"),
    "header length": (
        safetensors_bytes({"a": GOOD}, length=1 << 62),
        "claims a header of 4611686018427387904 bytes",
    ),
    "header ends early": (safetensors_bytes({"a": GOOD}, length=20), "its header: not valid JSON"),
    "no JSON": (safetensors_bytes(b"hello"), "its header: not valid JSON: Expecting value"),
    "no UTF-8": (safetensors_bytes(b'{"a": \xff}'), "its header: not valid JSON"),
    "nested": (safetensors_bytes(b"[" * 100_000), "its header: not valid JSON"),
    "long number": (safetensors_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "its header: not valid JSON"),
    "a list": (safetensors_bytes([]), "its header: expected a JSON object, found list"),
    "name twice": (safetensors_bytes(b'{"a": {}, "a": 1}'), "the key 'a' appears twice"),
    "no table": (safetensors_bytes({"a": 3}), "tensor 'a' is described by 3"),
    "field missing": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}),
        "tensor 'a' is described by {'dtype'",
    ),
    "dtype of another type": (
        safetensors_bytes({"a": entry(["F32"])}),  # type: ignore[arg-type]
        "has the dtype ['F32'], expected a name",
    ),
    "dimension 0": (safetensors_bytes({"a": entry(shape=[0, 4])}), "takes 64 bytes at its data_offsets, and 0"),
    "unknown dtype": (safetensors_bytes({"a": entry("F3", offsets=[64, 0])}), "takes -64 bytes at its data_offsets"),
    "negative": (safetensors_bytes({"a": entry(shape=[-4, -4])}), "has the shape [-4, -4]"),
    "boolean": (safetensors_bytes({"a": entry(shape=[True, 16])}), "has the shape [True, 16]"),
    "float": (safetensors_bytes({"a": entry(shape=[4.0, 4])}), "has the shape [4.0, 4]"),
    "65 dimensions": (
        safetensors_bytes({"a": entry(shape=[1] * 63 + [4, 4])}),
        "expected up to 64 numbers of at least 0",
    ),
    "overflow": (
        safetensors_bytes({"a": entry(shape=[1 << 62] * 4)}),
        "takes 64 bytes at its data_offsets, and 1809",
    ),
    "offsets swapped": (
        safetensors_bytes({"a": entry(offsets=[64, 0])}),
        "takes -64 bytes at its data_offsets",
    ),
    "one offset": (safetensors_bytes({"a": entry(offsets=[64])}), "has the data_offsets [64], expected two"),
    "size lies": (
        safetensors_bytes({"a": entry(offsets=[0, 60])}),
        "takes 60 bytes at its data_offsets, and 64",
    ),
    "truncated": (
        safetensors_bytes({"a": GOOD}, data=63),
        "is truncated or damaged: tensor 'a' ends at byte",
    ),
    "overlap": (
        safetensors_bytes({"a": GOOD, "b": entry(offsets=[32, 96])}, data=96),
        "tensors 'a' and 'b' overlap",
    ),
    "a name of two lines": (safetensors_bytes({"a\nb": 1}), r"tensor 'a\nb' is described"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / SINGLE).write_bytes(data)
    error = error_line(tmp_path)
    assert message in error
    assert str(tmp_path) in error


def shard(folder: Path, weights: object, **files: dict[str, float]) -> None:
    """Write an index with that weight_map, and files of tensors [2, 2], each filled with one value."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    for name, values in files.items():
        tensors = {key: torch.full((2, 2), value) for key, value in values.items()}
        save_file(tensors, folder / f"{name}.safetensors")


def test_shards_through_the_links_of_a_hub_cache(tmp_path: Path) -> None:
    """snapshots/…/file → ../../blobs/…: names that lead outside are rejected, links are not."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shard(blobs, {"x": "one.safetensors", "y": "two.safetensors"}, one={"x": 1.0, "extra": 3.0}, two={"y": 2.0})
    (blobs / "config").write_text('{"model_type": "olmoe"}')
    for name, blob in ((INDEX, INDEX), ("config.json", "config")):
        (snapshot / name).symlink_to(blobs / blob)
    for name in ("one.safetensors", "two.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    with open_checkpoint(snapshot) as checkpoint:
        assert {name: checkpoint.tensor(name)[0, 0].item() for name in checkpoint.tensors} == {
            "x": 1.0,
            "y": 2.0,
        }
        assert checkpoint.files == [snapshot / "one.safetensors", snapshot / "two.safetensors"]
        assert checkpoint.json("config.json") == {"model_type": "olmoe"}
        assert checkpoint.json("generation_config.json") is None


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors",
        "/etc/one.safetensors",
        "sub/one.safetensors",
        "..",
        "one.bin",
        "a\\b.safetensors",
        3,
        None,
    ],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, name: object) -> None:
    shard(tmp_path, {"x": name}, one={"x": 1.0})
    assert "expected a .safetensors file in the same directory" in error_line(tmp_path)


def test_incomplete_downloads(tmp_path: Path) -> None:
    shard(tmp_path, {"x": "one.safetensors", "y": "two.safetensors"}, one={"x": 1.0})
    assert "lacks 1 of 2 shards: 'two.safetensors'" in error_line(tmp_path)
    shard(tmp_path, {"x": "one.safetensors", "y": "one.safetensors"}, one={"x": 1.0})
    assert "one.safetensors lacks tensors that model.safetensors.index.json lists in it: 'y'" in error_line(tmp_path)
    for weights in ({}, [], None):
        shard(tmp_path, weights)
        assert "has no weight_map" in error_line(tmp_path)


def test_config_files_that_are_no_objects(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / SINGLE)
    with open_checkpoint(tmp_path) as checkpoint:
        for text in (b"", b"{", b"[]", b'"x"', b'{"a": \xff}', b"[" * 100_000, b'{"a": 1, "a": 2}'):
            (tmp_path / "config.json").write_bytes(text)
            with pytest.raises(OffmoeError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
                checkpoint.json("config.json")
        with (tmp_path / "config.json").open("wb") as file:
            file.truncate(1 << 40)  # sparse
        with pytest.raises(OffmoeError, match="expected a JSON file of at most 67108864"):
            checkpoint.json("config.json")
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").mkdir()
        with pytest.raises(OffmoeError, match="is not a regular file"):
            checkpoint.json("config.json")
