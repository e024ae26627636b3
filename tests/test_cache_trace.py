"""A trace survives its file; what is no trace is refused in one line."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import of, synthetic

from offmoe.cache.trace import Trace

SHARED = Path(__file__).parents[2] / "shared/traces"
UNKNOWN = 65535


def full() -> Trace:
    """One with everything: two sequences, weights, prompts of which one event is unknown."""
    trace = synthetic(6, 2, 8, 2, sequences=2)
    prefill = synthetic(5, 2, 8, 2, seed=1).experts
    prefill[0, 1] = UNKNOWN
    probs = np.full(trace.experts.shape, 0.5, np.float16)
    return replace(trace, probs=probs, prefill=prefill, prefill_offsets=np.array([0, 5, 5]))


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    for trace in (full(), synthetic(4, 1, 300, 3), of([[0], [1]], 2)):
        trace.save(tmp_path / "t.npz")
        again = Trace.load(tmp_path / "t.npz")
        for name, value in vars(trace).items():
            np.testing.assert_equal(getattr(again, name), value)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full().save(tmp_path / "t.npz")
    before = (tmp_path / "t.npz").read_bytes()

    def disk_full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    with pytest.raises(OSError, match="No space"):
        of([[1]], 2).save(tmp_path / "t.npz")
    assert (tmp_path / "t.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_prompts_of_a_single_sequence_need_no_offsets() -> None:
    one = replace(of([[0], [1]], 2), prefill=np.array([[[1]], [[0]], [[1]]], np.uint16))
    assert one.prompts.tolist() == [0, 3]
    assert of([[0]], 2).prompts.tolist() == [0, 0]


META = {"model": "m", "layers": 2, "experts": 8, "top_k": 2}
GOOD = np.tile(np.arange(2, dtype=np.uint16), (6, 2, 1))  # [6, 2, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"experts": GOOD.astype(np.int64)},
            "experts must be uint8 or uint16 [tokens, 2, 2], found int64",
        ),
        ({"experts": GOOD[:, :1]}, "found uint16 [6, 1, 2]"),
        ({"experts": GOOD[0]}, "found uint16 [2, 2]"),
        ({"experts": GOOD[:0]}, "found uint16 [0, 2, 2]"),
        ({"experts": GOOD + np.uint16(7)}, "experts holds an id above 7 at token 0, layer 0"),
        ({"experts": np.full_like(GOOD, UNKNOWN)}, "experts holds no expert at token 0, layer 0"),
        ({"experts": GOOD // 2}, "experts holds one expert twice at token 0, layer 0"),
        ({"meta": {**META, "experts": 1}}, "meta's top_k is 2: expected a whole number from 1 to 1"),
        ({"meta": {**META, "layers": 3}}, "[tokens, 3, 2]"),
        ({"meta": {**META, "layers": "2"}}, "meta's layers is '2'"),
        ({"meta": {**META, "layers": True}}, "meta's layers is True"),
        ({"meta": {**META, "experts": None}}, "meta's experts is None"),
        ({"meta": {**META, "model": 3}}, "names its model"),
        ({"meta": []}, "meta must be a JSON object"),
        (
            {"offsets": np.array([0, 5])},
            "offsets must be whole numbers that rise from 0 to 6",
        ),
        ({"offsets": np.array([1, 6])}, "rise from 0 to 6"),
        ({"offsets": np.array([6])}, "rise from 0 to 6"),
        ({"offsets": np.array([0, 4, 2, 6])}, "rise from 0 to 6"),
        ({"offsets": np.array([0.0, 6.0])}, "found float64 [2]"),
        ({"offsets": np.array([[0], [6]])}, "found int64 [2, 1]"),
        ({"offsets": np.array([0, 3, 3, 6])}, "a sequence is empty"),
        (
            {"probs": np.ones((6, 2), np.float16)},
            "probs must be finite float16 [6, 2, 2]",
        ),
        ({"probs": np.ones((6, 2, 2))}, "found float64 [6, 2, 2]"),
        ({"probs": np.full((6, 2, 2), np.nan, np.float16)}, "probs must be finite"),
        (
            {"prefill": GOOD[..., :1]},
            "prefill must be uint8 or uint16 [tokens, 2, 2]",
        ),
        ({"prefill": GOOD + np.uint16(9)}, "prefill holds an id above 7"),
        ({"prefill": GOOD, "prefill_offsets": np.array([0, 5])}, "prefill_offsets must be whole numbers"),
        ({"prefill": GOOD, "prefill_offsets": np.array([0, 3, 6])}, "2 prompts of 1 sequences"),
    ],
)
def test_an_unsound_trace_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    arrays: dict[str, Any] = {"experts": GOOD, "offsets": np.array([0, 6]), "meta": META}
    Trace(**arrays)
    with pytest.raises(ValueError) as caught:
        Trace(**{**arrays, **change})
    assert words in str(caught.value)
    arrays = {**arrays, **change}
    np.savez(tmp_path / "bad.npz", **{**arrays, "meta": np.array(json.dumps(arrays["meta"]))})
    refused(tmp_path / "bad.npz", words)


def refused(path: Path, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Trace.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is no routing trace: ")
    assert words in message
    assert "\n" not in message


def test_other_files_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    whole = {"experts": GOOD, "offsets": np.array([0, 6]), "meta": np.array(json.dumps(META))}
    refused(bad, "No such file")
    refused(tmp_path, "Is a directory")
    for content in (b"", b"text\n", b"\x80\x04N."):  # the last is a pickle
        bad.write_bytes(content)
        refused(bad, "not a zip file")
    for arrays, words in (
        ({"experts": GOOD, "offsets": GOOD}, "meta is missing: expected experts, offsets, meta, probs"),
        ({"experts": GOOD, "meta": GOOD}, "offsets is missing"),
        ({**whole, "extra": GOOD}, "'extra' is unknown: expected experts, offsets, meta, probs"),
        ({**whole, "meta": np.array("{}{}")}, "Extra data"),
        ({**whole, "meta": np.array({"a": 1}, object)}, "allow_pickle=False"),
    ):
        with bad.open("wb") as file:
            np.savez(file, **arrays)
        refused(bad, words)


def small_file() -> bytes:
    file = io.BytesIO()
    np.savez(file, experts=GOOD, offsets=np.array([0, 6]), meta=np.array(json.dumps(META)))
    return file.getvalue()


CONTENT = small_file()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), st.floats(0.5, 1))
def test_a_damaged_file_is_a_trace_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]], keep: float
) -> None:
    content = bytearray(CONTENT[: int(len(CONTENT) * keep)])
    for at, value in changes:
        content[int(at * (len(content) - 1))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content)
    assert "\n" not in verdict(path)


def verdict(path: Path) -> str:
    try:
        Trace.load(path)
    except ValueError as error:
        return str(error)
    return "a trace"


@pytest.mark.parametrize("name", ["gpt-oss-20b", "qwen3-30b-a3b-top6"])
def test_the_shared_traces_load(name: str) -> None:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    trace = Trace.load(path)
    assert len(trace.offsets) == {"gpt-oss-20b": 134, "qwen3-30b-a3b-top6": 2}[name]
    assert trace.probs is not None
    assert (trace.prefill is None) == (name == "gpt-oss-20b")
