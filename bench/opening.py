"""Time to open a large checkpoint: headers, index, and the byte ranges of every expert.

    python -P bench/opening.py [NAME …] > bench/results/opening.csv

Files are sparse: headers and index are complete, weights take no disk space. Times are CPU seconds of one core, so that
other work on the machine does not count. Each round is a process of its own with everything imported; the minimum of
five is reported.
"""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offmoe.models.family import family_of
from offmoe.models.model import open_model
from offmoe.models.read_config import from_hf
from offmoe.models.shapes import trunk_roles

ROUNDS, SHARD = 5, 5_000_000_000
COLUMNS = ("shape", "weights", "gb", "tensors", "records", "seconds", "target of 60 GB")
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I32": 4}
QUANTISED: dict[str, Any] = {
    "bf16": None,
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}
SECONDS = {"bf16": 2, "fp8": 3, "awq": 3}
QWEN: dict[str, Any] = {"hidden_size": 2048, "head_dim": 128, "vocab_size": 151936, "norm_topk_prob": True,
                        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {**QWEN, "model_type": "qwen3_moe", "num_hidden_layers": 48, "num_attention_heads": 32,
                      "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
                      "moe_intermediate_size": 768},
    "qwen3-next-80b-a3b": {**QWEN, "model_type": "qwen3_next", "num_hidden_layers": 48, "num_attention_heads": 16,
                           "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10,
                           "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
                           "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
                           "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4},
    "llama-4-scout": {"model_type": "llama4", "hidden_size": 5120, "intermediate_size": 8192, "head_dim": 128,
                      "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40,
                      "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 1,
                      "vocab_size": 202048, "max_position_embeddings": 131072},
}  # fmt: skip
RUNS = (("qwen3-30b-a3b", "bf16"), ("qwen3-30b-a3b", "fp8"), ("qwen3-30b-a3b", "awq"), ("qwen3-next-80b-a3b", "fp8"),
        ("llama-4-scout", "bf16"))  # fmt: skip

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def entries(raw: dict[str, Any], weights: str) -> Iterator[Entry]:
    """Yield every tensor of a checkpoint with this config."""
    family = family_of("model_type", raw["model_type"])
    config = from_hf(raw, family)
    for role, layer, shape in trunk_roles(config):
        packed = len(shape) == 2 and role.split("_")[0] in ("q", "k", "v", "o")
        yield from stored(family.names[role][0].format(l=layer), shape, weights if packed else "bf16")
    inner = config.moe.expert_hidden
    wide, narrow = (inner, config.hidden), (config.hidden, inner)
    for layer in config.routed:
        if "gate" not in family.names or family.transposed_experts:
            both = (config.experts, config.hidden, 2 * inner)
            for role, shape in (("gate_up", both), ("down", (config.experts, *wide))):
                name = next(name for name in family.names[role] if "{e}" not in name)
                yield name.format(l=layer), "BF16", shape
            continue
        for expert in range(config.experts):
            for role, shape in (("gate", wide), ("up", wide), ("down", narrow)):
                yield from stored(family.names[role][0].format(l=layer, e=expert), shape, weights)


def stored(name: str, shape: tuple[int, ...], weights: str) -> Iterator[Entry]:
    """Yield the tensors of one matrix in its format."""
    if weights == "bf16":
        yield name, "BF16", shape
        return
    rows, cols = shape
    if weights == "fp8":
        yield name, "F8_E4M3", shape
        yield f"{name}_scale_inv", "F32", (-(-rows // 128), -(-cols // 128))
        return
    module, group = name.removesuffix(".weight"), QUANTISED["awq"]["group_size"]
    yield f"{module}.qweight", "I32", (cols, rows // 8)
    yield f"{module}.qzeros", "I32", (cols // group, rows // 8)
    yield f"{module}.scales", "F16", (cols // group, rows)


def write(folder: Path, raw: dict[str, Any], weights: str, shard: int = SHARD) -> int:
    """Write a sparse checkpoint in shards of at most `shard` bytes; return its number of tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": QUANTISED[weights]}))
    shards: list[dict[str, Any]] = [{}]
    where, offset = {}, 0
    for name, dtype, shape in entries(raw, weights):
        nbytes = BYTES[dtype]
        for n in shape:
            nbytes *= n
        if offset and offset + nbytes > shard:
            shards.append({})
            offset = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        where[name], offset = len(shards), offset + nbytes
    files = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    index = {"metadata": {}, "weight_map": {name: files[number - 1] for name, number in where.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, header in zip(files, shards, strict=True):
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    return len(where)


def seconds(folder: Path) -> float:
    """Return the time of one opening, including the byte ranges of every expert."""
    began = time.process_time()
    model = open_model(folder)
    for moe_layer in range(model.config.moe_layers):
        for expert in range(model.config.experts):
            model.ranges(moe_layer, expert)
    elapsed = time.process_time() - began
    model.checkpoint.close()
    return elapsed


def measure(shape: str, weights: str) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        tensors = write(path, SHAPES[shape], weights)
        gb = sum(file.stat().st_size for file in path.iterdir()) / 1e9
        command = [sys.executable, "-P", __file__, "--open", str(path)]
        outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(ROUNDS)]
        model = open_model(path)
    return [shape, weights, f"{gb:.0f}", tensors, model.records, f"{min(map(float, outputs)):.2f}", SECONDS[weights]]


def main() -> None:
    if sys.argv[1:2] == ["--open"]:
        print(seconds(Path(sys.argv[2])))
        return
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(COLUMNS)
    for shape, weights in RUNS:
        if not sys.argv[1:] or shape in sys.argv[1:]:
            out.writerow(measure(shape, weights))
            sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
