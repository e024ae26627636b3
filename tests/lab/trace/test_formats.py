"""CSV and JSON lines round-trip; files of other recorders are read; invalid files give one-line errors."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_traces import synthetic

from offmoe.cache.trace import Trace
from offmoe.lab.trace.formats import read_any, write_any


def full() -> Trace:
    """Two sequences with prompts, weights, a padded event and an unknown one."""
    rng = np.random.default_rng(1)
    trace = synthetic(6, 2, 8, 3, sequences=2)
    experts = trace.experts.astype(np.uint8)
    experts[2, 1, 1:] = 255
    probs = rng.random(experts.shape).astype(np.float16)
    probs[experts == 255] = 0
    prefill = synthetic(5, 2, 8, 3, seed=1).experts.astype(np.uint8)
    prefill[:2, 1] = 255
    shares = rng.random(prefill.shape).astype(np.float16)
    shares[prefill == 255] = 0
    return Trace(experts, trace.offsets, {"model": "m", "layers": 2, "experts": 8, "top_k": 3}, probs=probs,
                 prefill=prefill, prefill_probs=shares, prefill_offsets=np.array([0, 2, 5]))  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".npz"])
@pytest.mark.parametrize("weights", [True, False])
def test_a_trace_comes_back_equal(suffix: str, weights: bool, tmp_path: Path) -> None:
    trace = full() if weights else replace(full(), probs=None, prefill_probs=None)
    write_any(trace, tmp_path / f"t{suffix}")
    assert read_any(tmp_path / f"t{suffix}") == trace
    assert len(list(tmp_path.iterdir())) == 1


def written(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_line_an_expert_is_read_by_rank(tmp_path: Path) -> None:
    lines = "token,layer,rank,expert,weight\n0,0,1,5,0.25\n0,0,0,3,0.75\n1,0,0,2,0.5\n1,0,1,7,0.5\n"
    trace = read_any(written(tmp_path, "routing.csv", lines), "some/model", 16)
    assert trace.experts.tolist() == [[[3, 5]], [[2, 7]]]
    assert trace.probs is not None
    assert trace.probs.tolist() == [[[0.75, 0.25]], [[0.5, 0.5]]]
    assert trace.meta == {"model": "some/model", "layers": 1, "experts": 16, "top_k": 2}


@pytest.mark.parametrize(
    "lines",
    [
        "seq_id,pos,il,topk_ids\n0,7,0,[3; 5]\n0,8,0,[2; 7]\n",
        "TOKEN,LAYER,EXPERTS\n1,0,3|5\n2,0,2|7\n",
        '\ufefftoken,layer,experts\r\n1,0,"3,5"\r\n2,0,"2,7"\r\n',
        "# a comment\nlayer,token,experts\n\n0,2,2 7\n0,1,3 5\n",  # in any order
    ],
)
def test_other_names_and_separators(lines: str, tmp_path: Path) -> None:
    trace = read_any(written(tmp_path, "other.csv", lines))
    assert trace.experts.tolist() == [[[3, 5]], [[2, 7]]]
    assert trace.meta == {"model": "other", "layers": 1, "experts": 8, "top_k": 2}


def test_sequences_without_a_decoded_token_are_left_out(tmp_path: Path) -> None:
    lines = "sequence,token,layer,phase,experts\n0,0,0,prefill,1\n1,0,0,prefill,2\n1,1,0,decode,3\n4,0,0,decode,0\n"
    trace = read_any(written(tmp_path, "t.csv", lines))
    assert trace.prefill is not None
    assert (trace.prefill.tolist(), trace.prompts.tolist()) == ([[[2]]], [0, 1, 1])
    assert (trace.experts.tolist(), trace.offsets.tolist()) == ([[[3]], [[0]]], [0, 1, 2])


def test_arrays_of_another_recorder_are_adopted(tmp_path: Path) -> None:
    ids = np.array([[[3, 5]], [[2, -1]]], np.int64)
    np.savez(tmp_path / "x.npz", topk_ids=ids, topk_weights=np.array([[[0.5, 0.5]], [[1, 0]]]), cu_seqlens=[0, 1, 2])
    trace = read_any(tmp_path / "x.npz", experts=300)
    assert trace.experts.dtype == np.uint16
    assert trace.experts.tolist() == [[[3, 5]], [[2, 65535]]]
    assert trace.offsets.tolist() == [0, 1, 2]
    assert trace.probs is not None
    assert trace.meta["experts"] == 300


HEAD = "sequence,token,layer,phase,experts,weights\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "", "it has no decoded token"),
        ("t.csv", "a,b\n1,2\n", "there is no column 'token' in 'a,b': expected sequence,token,layer"),
        ("t.csv", HEAD + "0,0,zero,decode,1,\n", "line 2: invalid literal"),
        ("t.csv", HEAD + "0,0\n", "line 2: list index out of range"),
        ("t.csv", HEAD + "0,0,0,decode,1 2,0.5\n", "line 2: 1 weights for 2 experts"),
        ("t.csv", HEAD + "0,0,0,decode,-4,\n", "line 2: a number is below 0"),
        ("t.csv", HEAD + "0,0,0,decode,70000,\n", "an expert or layer above 65534"),
        ("t.csv", HEAD + "0,0,65000,decode,1,\n", "holds no expert at token 0, layer 0"),
        ("t.csv", HEAD + "0,0,0,decode,1,\n0,1,1,decode,1,\n", "holds no expert at token 0, layer 1"),
        ("t.csv", HEAD + "0,0,0,decode,1,\n0,0,0,decode,1,\n", "one expert twice"),
        ("t.csv", HEAD + "0,0,0,prefill,1,\n", "it has no decoded token"),
        ("t.csv", HEAD + "0,0,0,decode,1,\n0,0,3,prefill,1,\n", "a prompt has layer 3, which no decoded token has"),
        (
            "t.csv",
            '# {"layers": 9}\n' + HEAD + "0,0,0,decode,1,\n",
            "its header says layers 9, top_k 1, but it has 1, 1",
        ),
        ("t.csv", '# {"experts": 1}\n' + HEAD + "0,0,0,decode,1,\n", "an id above 0"),
        ("t.csv", '# {"experts": "x"}\n' + HEAD + "0,0,0,decode,1,\n", ""),
        (
            "t.csv",
            HEAD + "0,0,65000,decode,1,\n0,1,65000,decode,1,\n",
            "2 ids are too few for 2 tokens of 65001 layers",
        ),
        ("t.csv", HEAD + "0,0,0,decode,1,nan\n", "line 2: a weight is not a finite number"),
        ("t.csv", HEAD + "0,0,0,decode,1,1e9\n", "probs must be finite float16"),
        ("t.csv", HEAD + "0,9999999999999999999999,0,decode,1,\n", "line 2: int too big"),
        ("t.jsonl", "{\n", "line 1 is not a token"),
        ("t.jsonl", "[]\n", "line 1 is not a token"),
        ("t.jsonl", '{"experts": [["a"]]}\n', "line 1 is not a token"),
        ("t.jsonl", '{"experts": [[1]], "weights": [[1], [2]]}\n', "line 1 is not a token"),
        ("t.jsonl", '{"experts": [[1.5]]}\n', "line 1 is not a token"),
        ("t.npz", "text", "File is not a zip file"),
        ("t.parquet", "", "ends with '.parquet': expected .npz, .csv or .jsonl"),
    ],
)
def test_what_is_no_routing_is_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    refused(written(tmp_path, name, content), words)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.zeros(3)}, "it has no ids: expected integers [tokens, layers, k] named experts, expert_ids"),
        ({"ids": np.zeros((2, 2, 2))}, "it has no ids"),
        ({"ids": np.zeros((2, 0, 2), int)}, "it has no ids"),
        ({"ids": np.full((1, 1, 1), -2)}, "its ids range from -2 to -2"),
        ({"ids": np.full((1, 1, 1), 70000)}, "to 70000"),
        ({"ids": np.zeros((2, 1, 1), int), "offsets": np.array([0, 9])}, "rise from 0 to 2"),
        ({"ids": np.zeros((2, 1, 1), int), "probs": np.array(["x"])}, ""),
        ({"ids": np.ones((2, 1, 2), int)}, "one expert twice"),
        ({"ids": np.zeros((1, 1, 1), int), "probs": np.full((1, 1, 1), 1e9)}, "probs must be finite float16"),
        ({"ids": np.array([{}], object)}, "allow_pickle=False"),
    ],
)
def test_arrays_that_are_no_routing_are_refused(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", words)


def refused(path: Path, words: str) -> None:
    with warnings.catch_warnings(action="error"), pytest.raises(ValueError) as caught:
        read_any(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*t\.csv: No such file"):
        read_any(tmp_path / "t.csv")


def test_jsonl_is_what_the_documentation_says(tmp_path: Path) -> None:
    write_any(full(), tmp_path / "t.jsonl")
    head, first, *_ = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    assert head == {"model": "m", "layers": 2, "experts": 8, "top_k": 3}
    assert (first["sequence"], first["token"], first["phase"]) == (0, 0, "prefill")
    assert first["experts"][1] == []
