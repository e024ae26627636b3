"""Tensors of types and ranks that offmoe does not compute with: kept where no role needs them, else refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import model_directory, rewritten
from packed_files import packed
from tiny_engines import decoded, engine_of

from offmoe.checkpoint.safetensors import BITS, FLOATS
from offmoe.errors import OffmoeError
from offmoe.models.model import open_model

IDS = torch.randint(3, 96, (12,), generator=torch.Generator().manual_seed(3)).tolist()
SHAPES: list[list[int]] = [
    [],
    [8],
    [2, 8],
    [2, 2, 8],
    [2, 1, 2, 8],
    [2, 3, 2, 2, 8],
    [1, 1, 2, 1, 2, 8],
    [0],
    [3, 0, 4],
]
NEEDED = "model.layers.1.self_attn.q_proj.weight"  # 32 x 32
Header = dict[str, dict[str, Any]]


def rewrite(source: Path, path: Path, edit: Callable[[Header, int], bytes]) -> Path:
    """Copy a directory; `edit` changes the header, given the bytes of all data, and returns data to append."""
    raw = (source / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    more = edit(header, len(data))
    text = json.dumps(header).encode()
    path.mkdir(exist_ok=True)
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data + more)
    return path


def add(header: Header, at: int, name: str, dtype: str, shape: list[int]) -> bytes:
    """Append a tensor, its bytes random, behind `at` bytes of data."""
    nbytes = -(-prod(shape) * BITS.get(dtype, 24) // 8)
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
    return np.random.default_rng(0).bytes(nbytes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("foreign") / "plain")


@pytest.fixture(scope="module")
def right(plain: Path) -> torch.Tensor:
    return logits(plain)


def logits(path: Path) -> torch.Tensor:
    with engine_of(path, dtype="f32") as engine:
        return decoded(engine, IDS, prompt=4)[0]


def refusal(path: Path) -> str:
    """The one-line error of opening `path`."""
    with pytest.raises(OffmoeError) as caught:
        open_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAMES = ["model.visual.{}.weight", "vision_tower.{}", "mtp.{}.weight", "model.layers.0.self_attn.{}", "buffer_{}"]


def test_every_type_and_rank_where_no_role_needs_it(plain: Path, right: torch.Tensor, tmp_path: Path) -> None:
    def edit(header: Header, at: int) -> bytes:
        more = b""
        for dtype in [*BITS, "F3_OF_THE_FUTURE"]:
            for number, shape in enumerate(SHAPES):
                name = NAMES[number % len(NAMES)].format(f"{dtype.lower()}_{number}")
                more += add(header, at + len(more), name, dtype, shape)
        return more

    path = rewrite(plain, tmp_path / "m", edit)
    assert torch.equal(logits(path), right)


@pytest.mark.parametrize("dtype", [*BITS, "F3_OF_THE_FUTURE"])
def test_every_type_and_rank_where_a_role_needs_it(dtype: str, plain: Path, tmp_path: Path) -> None:
    for shape in SHAPES:

        def edit(header: Header, at: int, shape: list[int] = shape) -> bytes:
            del header[NEEDED]
            return add(header, at, NEEDED, dtype, shape)

        error = refusal(rewrite(plain, tmp_path / "m", edit))
        assert NEEDED in error
        if dtype in ("F8_E4M3", "U8"):  # they may be a matrix with scales
            assert f"{NEEDED}_scale" in error or f"expected {dtype} [rows, columns]" in error
        elif dtype in FLOATS:
            assert "is empty" in error or f"has shape {shape}: the config asks for [32, 32]" in error
        else:
            assert f"has dtype '{dtype}': expected F32, F16, BF16" in error


@pytest.mark.parametrize("role", ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight",
                                  "model.layers.1.mlp.experts.3.down_proj.weight"])  # fmt: skip
def test_no_role_takes_one(role: str, plain: Path, tmp_path: Path) -> None:
    def edit(header: Header, at: int) -> bytes:
        shape = header.pop(role)["shape"]
        return add(header, at, role, "F64", shape)

    error = refusal(rewrite(plain, tmp_path / "m", edit))
    assert f"tensor '{role}' has dtype 'F64': expected F32, F16, BF16" in error


STRAY: dict[str, dict[str, tuple[str, list[int]]]] = {
    "g_idx": {"model.layers.0.mlp.gate.g_idx": ("I32", [32])},
    "float8 without its scales": {"model.visual.blocks.0.mlp.linear_fc2.weight": ("F8_E4M3", [32, 80])},
    "float8 of another tile": {"mtp.fc.weight": ("F8_E4M3", [64, 96]), "mtp.fc.weight_scale_inv": ("F32", [2, 3])},
    "codes alone": {"mtp.fc.weight_packed": ("I32", [8, 3]), "mtp.fc.weight_scale": ("F16", [8, 1])},
    "NVFP4 of odd width": {"mtp.fc.weight": ("U8", [8, 7]), "mtp.fc.weight_scale": ("F8_E4M3", [8, 1])},
    "smoothed": {"mtp.fc.pre_quant_scale": ("BF16", [32])},
    "gptq of an odd group": {"mtp.fc.qweight": ("I32", [3, 8]), "mtp.fc.scales": ("F16", [1, 8]),
                             "mtp.fc.qzeros": ("I32", [1, 1]), "mtp.fc.g_idx": ("I32", [24])},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}}},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stray", STRAY)
def test_parts_of_matrices_that_nobody_needs(
    stray: str, config: str, plain: Path, right: torch.Tensor, tmp_path: Path
) -> None:
    def edit(header: Header, at: int) -> bytes:
        more = b""
        for name, (dtype, shape) in STRAY[stray].items():
            more += add(header, at + len(more), name, dtype, shape)
        return more

    path = rewrite(plain, tmp_path / "m", edit)
    raw = json.loads((path / "config.json").read_text()) | {"quantization_config": CONFIGS[config]}
    (path / "config.json").write_text(json.dumps(raw))
    assert torch.equal(logits(path), right)


def test_a_gguf_s(plain: Path, tmp_path: Path) -> None:
    """Types that no file's tensor has yet, ranks beyond ggml's, and empty ones, in front and behind."""
    path = packed(plain, tmp_path, "f32")
    want = logits(path)
    entries: list[tuple[str, list[int], int]] = [
        (f"mtp.{kind}.{number}", shape[::-1], kind)
        for kind in (2, 12, 16, 24, 25, 26, 27, 28, 29, 31, 34, 99) for number, shape in enumerate(SHAPES)
    ]  # fmt: skip
    other = with_tensors(path, tmp_path / "other.gguf", entries)
    assert torch.equal(logits(other), want)
    needed = with_tensors(
        path, tmp_path / "needed.gguf", [("blk.1.attn_q.weight", [32, 32], 28)], "blk.1.attn_q.weight"
    )
    assert "tensor 'blk.1.attn_q.weight' has the format F64: expected one of F32, F16" in refusal(needed)
    head = with_tensors(path, tmp_path / "head.gguf", [("output.weight", [32, 260], 99)], "output.weight")
    assert "tensor 'output.weight' has the format number 99" in refusal(head), "the embedding was taken for the head"


def with_tensors(source: Path, path: Path, entries: list[tuple[str, list[int], int]], without: str = "") -> Path:
    """A GGUF with more tensors, of 64 bytes each, in front of the data and behind it."""
    rewritten(source, path, **({without: None} if without else {}))
    raw, reader = path.read_bytes(), gguf.GGUFReader(path)
    first = min(tensor.data_offset for tensor in reader.tensors)
    at = -(-(len(raw) - first) // 32) * 32
    table = max(tensor.field.offset + sum(part.nbytes for part in tensor.field.parts) for tensor in reader.tensors)
    for name, dims, kind in entries:
        chars = name.encode()
        more = struct.pack("<Q", len(chars)) + chars + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        raw = raw[:table] + more + struct.pack("<IQ", kind, at) + raw[table:]
        table, first, at = table + len(more) + 12, first + len(more) + 12, at + 64
    header, data = raw[:table], raw[first:]
    header += bytes(-len(header) % 32)
    data += bytes(at - len(data))
    count = struct.pack("<Q", len(reader.tensors) + len(entries))
    path.write_bytes(header[:8] + count + header[16:] + data)
    return path
