"""Generators and computations of the benchmarks; the engine itself is run only on a GPU."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exhaustive import cases
from paths import ROOT

from offmoe.engine import Engine
from offmoe.kernels.formats import FORMATS, dequantise
from offmoe.models.model import open_model
from offmoe.settings import Settings

BENCH = str(ROOT / "bench")
sys.path.insert(0, BENCH)  # for a moment: there are common names in that folder
try:
    import decode
    import misses
    import rig
    import routing
    import shapes
finally:
    sys.path.remove(BENCH)

SMALL = {"layers": 48, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 512, "experts": 8, "top_k": 2,
         "inner": 256, "ctx": 64}  # fmt: skip
LATENT = {"layers": 27, "kv_rank": 64, "qk_rope": 32, "value": 64, "first": 256, "kv_heads": 1}
LINEAR = {"layers": 4, "rotary": 32, "key_heads": 2, "value_heads": 4, "key_dim": 64}
OWN = {"olmoe": {"kv_heads": 4}, "deepseek-v2-lite": LATENT, "glm-4.7-flash": LATENT, "qwen3.6-35b-a3b": LINEAR,
       "lfm2-8b-a1b": {"layers": 24, "first": 256}, "llama-4-scout": {"layers": 8, "top_k": 1}}  # fmt: skip


@pytest.mark.parametrize("fmt", [*shapes.FLOATS, *shapes.SCALES, "IQ1_M", "MXFP4"])
def test_weights_are_sane(fmt: str) -> None:
    rows, cols = 64, 512
    raw = torch.from_numpy(shapes.weights(np.random.default_rng(0), fmt, rows, cols))
    assert raw.shape == (rows, FORMATS[fmt].nbytes(1, cols))
    weights = dequantise(raw.flatten(), fmt, rows, cols)
    assert float(weights.square().mean()) ** 0.5 == pytest.approx(cols**-0.5, rel=0.45 if fmt == "MXFP4" else 0.05)
    assert abs(float(weights.mean())) < 0.13 * cols**-0.5  # a nibble less 8 is -0.5 on average
    assert weights.isfinite().all()


TELLING = ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite", "lfm2-8b-a1b", "qwen3.6-35b-a3b"]


@pytest.mark.parametrize("name", cases(shapes.SHAPES, TELLING))
def test_a_small_file_of_each_shape_runs(name: str, tmp_path: Path) -> None:
    given = shapes.SHAPES[name]
    small = {**SMALL, **OWN.get(name, {})}
    for path in (tmp_path / "a.gguf", tmp_path / "b.gguf"):
        shapes.write(name, path, **small)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with Engine(open_model(tmp_path / "a.gguf"), Settings.of(device="cpu", vram="100%", ram=0)) as engine:
        logits = engine.prefill(list(range(40)))
        forgets = [name for name in engine.model.checkpoint.tensors if name.endswith("ssm_a")]
        assert all(float(engine.model.checkpoint.tensor(name).max()) < 0 for name in forgets)
        assert bool(forgets) == ("every" in given)
    assert logits.isfinite().all()
    assert logits.std() > 0.1


def test_shapes_are_the_real_ones() -> None:
    sizes = {
        name: sum(FORMATS[fmt].nbytes(int(np.prod(dims[:-1])), dims[-1]) for _, fmt, dims in shapes.tensors(s))
        for name, s in shapes.SHAPES.items()
    }
    assert {name: round(size / 1e9, 1) for name, size in sizes.items()} == {
        "qwen3-30b-a3b": 17.3, "gpt-oss-20b": 12.1, "olmoe": 7.4, "mixtral-8x7b": 26.3,
        "deepseek-v2-lite": 9.5, "glm-4.7-flash": 17.1, "qwen3.6-35b-a3b": 19.7,
        "gemma-4-26b-a4b": 15.2, "lfm2-8b-a1b": 4.7, "llama-4-scout": 11.4,
    }  # fmt: skip


def test_realistic_routing_hits_as_published() -> None:
    ids = routing.realistic(1500)
    assert ids.dtype == np.int16
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all(), "k distinct experts"
    assert np.array_equal(ids[:50], routing.realistic(50)), "the same for a seed"
    assert 0.38 <= routing.reuse(ids) <= 0.43
    for slots, published in ((16, 0.647), (32, 0.810), (64, 0.918)):
        hit = float(routing.replayed(ids, 128, "lru", slots).hit[200:].mean())
        assert hit == pytest.approx(published, abs=0.01), f"{slots} slots"


def test_uniform_routing_hits_what_is_resident() -> None:
    ids = routing.uniform(600, layers=4)
    assert float(routing.replayed(ids, 128, "lru", 64).hit[200:].mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("recall", "precision"), [(0.727, 0.557), (0.142, 0.987), (0.877, 0.129), (1.0, 1.0)])
def test_predictions_have_the_quality_asked_for(recall: float, precision: float) -> None:
    """Recall of LRU's misses, and precision among experts without a slot."""
    layers, slots, warm = 6, 64, 200
    ids = routing.realistic(900, layers)
    misses = float((~routing.replayed(ids, 128, "lru", slots).hit[warm:]).mean()) * 8
    lists = routing.predicted(ids, 128, recall, precision, slots, misses)
    last, right, wrong, missed = np.full((layers, 128), -1), 0, 0, 0
    for token, chosen in enumerate(ids):
        named, routed = np.zeros((2, layers, 129), bool)  # the last column takes the padding
        np.put_along_axis(named, lists[token].astype(np.int64), True, 1)
        np.put_along_axis(routed, chosen.astype(np.int64), True, 1)
        if token >= warm:
            absent = np.argsort(np.argsort(-last, axis=1, kind="stable"), axis=1) >= slots
            hit, asked = (named[:, :-1] & absent), routed[:, :-1]
            right, wrong, missed = (
                right + (hit & asked).sum(),
                wrong + (hit & ~asked).sum(),
                missed + (absent & asked).sum(),
            )
        np.put_along_axis(last, chosen.astype(np.int64), token, 1)
    assert right / missed == pytest.approx(recall, abs=0.03)
    assert right / (right + wrong) == pytest.approx(precision, abs=0.03)


def test_an_absent_trace_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFMOE_TRACES", str(tmp_path))
    with pytest.raises(SystemExit, match=r"gpt-oss-20b.npz does not exist: set OFFMOE_TRACES"):
        routing.from_trace(tokens=10)


@pytest.mark.parametrize(("missing", "every"), [(0, 1), (1, 1), (1, 8), (4, 2)])
def test_so_many_of_the_forced_records_are_missing(missing: int, every: int) -> None:
    rig = SimpleNamespace(layers=24, experts=32, k=4)
    ids = misses.in_turn(rig, missing, every, 80)
    assert all(len(set(row)) == 4 for row in ids.reshape(-1, 4).tolist())
    hit = routing.replayed(ids, 32, "lru", 16).hit[40:].reshape(40, 24, 4)
    assert ((~hit).sum(2) == missing * (np.arange(24) % every == 0)).all()


def test_cells_are_those_asked_for() -> None:
    args = decode.parse_args(["--caps", "25,100", "--policies", "crf:h=16,lru@25", "--prefetch", "none", "oracle:d=2"])
    assert [tuple(vars(load).values()) for load in decode.loads(args)] == [
        ("25", "crf:h=16", "none"), ("25", "crf:h=16", "oracle:d=2"),
        ("25", "lru", "none"), ("25", "lru", "oracle:d=2"), ("100", "crf:h=16", "none"),
    ]  # fmt: skip
    assert decode.Emulated.of("gate:d=1,p=0.05") is None
    assert decode.Emulated.of("oracle:d=2") == decode.Emulated(1, 1, "gate:d=2,p=0")
    assert decode.Emulated.of("emulated:recall=0.7,precision=0.5,n=2") == decode.Emulated(0.7, 0.5, "gate:d=1,p=0,n=2")


def test_a_row_adds_up() -> None:
    """10 steps of 5 ms with 100 misses of 1 MB; 50 GB/s of link, 1 TB/s of VRAM."""
    rates = {"bandwidths": lambda: (1e12, 50e9), "vram_bytes": lambda context: 1e9, "record": 1e6}
    fake = SimpleNamespace(layers=48, kv=None, k=8, shape="qwen3-30b-a3b", **rates)
    ten = [np.full(10, value) for value in (5e-3, 284.0, 0.0, 0.0, 100.0, 100.0)]
    about = {"gpu": "", "commit": "", "torch": "", "triton": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "machine", lambda: about)
        load = decode.Load("50", "lru", "none")
        row = decode.row(fake, load, 128, "uniform", rig.Steps(*ten), 2e-3, 0.74, rig.Peer(None))  # type: ignore[arg-type]
    assert (row["tok_s"], row["hit_rate"], row["link_ms"], row["of_floor_and_link"]) == (
        200.0,
        "0.740",
        "2.000",
        "1.250",
    )
    assert (row["roof_tok_s"], row["share_of_roof"]) == (500.0, "0.400")
    assert (row["peer_tok_s"], row["peer_ratio"], row["peer_from"]) == (79.0, "2.53", "an earlier call")


def test_the_peer_of_this_call_comes_first(tmp_path: Path) -> None:
    names = ("model_filename", "n_cpu_moe", "n_prompt", "n_gen", "n_depth", "avg_ts")
    with (tmp_path / "peer.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, ("/tmp/qwen3-30b-a3b.gguf", 24, 0, 128, 0, 80.5)])
    peer = rig.Peer(tmp_path / "peer.csv")
    assert peer.speed("qwen3-30b-a3b", 48, 50, 0, 128, 0) == (80.5, "this call")
    assert peer.speed("qwen3-30b-a3b", 48, 25, 0, 128, 0) == (55.0, "an earlier call")
    assert peer.speed("olmoe", 16, 50, 0, 128, 0) == (0.0, "")


def test_rows_are_appended_under_one_head(tmp_path: Path) -> None:
    for value in (1, 2):
        rig.add_row(tmp_path / "new/rows.csv", {"a": value, "b": "x"})
    assert (tmp_path / "new/rows.csv").read_text().split() == ["a,b", "1,x", "2,x"]
