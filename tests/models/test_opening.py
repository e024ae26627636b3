"""Large checkpoints of holes, of sizes that people own, open and say where every record lies."""

from __future__ import annotations

import gc
import json
import sys
from math import prod
from pathlib import Path

import pytest
from paths import ROOT

from offmoe.errors import OffmoeError
from offmoe.models.model import open_model
from offmoe.models.parameters import count_weights

BENCH = str(ROOT / "bench")
sys.path.insert(0, BENCH)  # for a moment: there are common names in that folder
try:
    import opening
finally:
    sys.path.remove(BENCH)

# Bytes that a record of the shape takes: three matrices of 2048 x 768, or as many as Llama 4's, and their scales.
RECORDS = {
    ("qwen3-30b-a3b", "bf16"): 3 * 2048 * 768 * 2,
    ("qwen3-30b-a3b", "fp8"): 3 * (2048 * 768 + 16 * 6 * 4),
    ("qwen3-30b-a3b", "awq"): 3 * (2048 * 768 // 2 + 2048 * 768 // 128 * 2) + 3 * 2048 * 768 // 128 // 2,
    ("llama-4-scout", "bf16"): 3 * 5120 * 8192 * 2,
}


@pytest.mark.parametrize(("shape", "weights"), RECORDS)
def test_every_record_lies_where_its_tensors_do(shape: str, weights: str, tmp_path: Path) -> None:
    tensors = opening.write(tmp_path / "model", opening.SHAPES[shape], weights)
    collects = gc.isenabled()
    model = open_model(tmp_path / "model")
    assert gc.isenabled() == collects
    assert len(model.checkpoint.files) > 3
    each, config = tensors_of(tmp_path / "model"), model.config
    seen: set[tuple[int, int]] = set()
    for place in range(config.moe_layers):
        for expert in range(config.experts):
            ranges = model.ranges(place, expert)
            assert sum(r.nbytes for r in ranges) == RECORDS[shape, weights]
            seen |= {(r.file, r.offset) for r in ranges}
            for info, number in ((info, expert if info.matrices > 1 else 0) for info in model.parts(place, expert)):
                file, offset = each[info.name if weights != "awq" else info.name.removesuffix("weight") + "qweight"]
                lies = info.ranges(number)[-1]
                assert (lies.file, lies.offset) == (file, offset + number * lies.nbytes)
    assert len(seen) == model.records * len(model.ranges(0, 0)), "records share bytes"
    assert tensors == len(each)
    assert count_weights(model).total == pytest.approx({"q": 30.5e9, "l": 107.8e9}[shape[0]], rel=0.01)
    model.checkpoint.close()


def tensors_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Name → file's number and offset, read anew."""
    index, found = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"], {}
    for number, name in enumerate(dict.fromkeys(index.values())):
        with open(folder / name, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            for tensor, entry in json.loads(file.read(length)).items():
                assert (
                    entry["data_offsets"][1] - entry["data_offsets"][0]
                    == prod(entry["shape"]) * opening.BYTES[entry["dtype"]]
                )
                found[tensor] = (number, 8 + length + entry["data_offsets"][0])
    return found


def test_a_hole_in_the_index_is_found(tmp_path: Path) -> None:
    """One of 18,867 tensors."""
    opening.write(tmp_path / "model", opening.SHAPES["qwen3-30b-a3b"], "bf16")
    path, lost = tmp_path / "model/model.safetensors.index.json", "model.layers.31.mlp.experts.77.up_proj.weight"
    index = json.loads(path.read_text())
    del index["weight_map"][lost]
    path.write_text(json.dumps(index))
    with pytest.raises(OffmoeError, match=f"has no tensor {lost}: the file is incomplete"):
        open_model(tmp_path / "model")
    assert gc.isenabled()
