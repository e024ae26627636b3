"""A trace survives its file; what is no trace is refused in one line."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED
from synthetic_traces import of, synthetic

from offmoe.cache.trace import Trace

UNKNOWN = 65535


def full() -> Trace:
    """One with everything: two sequences, a padded event, prompts of which one event is unknown."""
    trace = synthetic(6, 2, 8, 2, sequences=2)
    trace.experts[3, 1, 1] = UNKNOWN
    prefill = synthetic(5, 2, 8, 2, seed=1).experts
    prefill[0, 1] = UNKNOWN
    floats = np.random.default_rng(0).random
    return replace(
        trace,
        meta={**trace.meta, "classes": ["a", "b"], "pieces": {"3": "é"}},
        probs=floats(trace.experts.shape).astype(np.float16),
        prefill=prefill,
        prefill_offsets=np.array([0, 2, 5]),
        prefill_probs=floats(prefill.shape).astype(np.float16),
        tokens=np.arange(6, dtype=np.int32),
        prefill_tokens=np.arange(5, dtype=np.int32),
        states=floats((6, 2, 4)).astype(np.float16),
        logits=floats((6, 2, 8)).astype(np.float16),
        gates=floats((2, 8, 4)).astype(np.float16),
    )


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    for trace in (full(), synthetic(4, 1, 300, 3), of([[0], [1]], 2)):
        trace.save(tmp_path / "t.npz")
        assert Trace.load(tmp_path / "t.npz") == trace
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full().save(tmp_path / "t.npz")
    before = (tmp_path / "t.npz").read_bytes()

    def disk_full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    with pytest.raises(ValueError, match="No space"):
        of([[1]], 2).save(tmp_path / "t.npz")
    assert (tmp_path / "t.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_prompts_of_a_single_sequence_need_no_offsets() -> None:
    one = replace(of([[0], [1]], 2), prefill=np.array([[[1]], [[0]], [[1]]], np.uint16))
    assert one.prompts.tolist() == [0, 3]
    assert of([[0]], 2).prompts.tolist() == [0, 0]


def test_traces_are_equal_where_everything_is() -> None:
    trace = full()
    assert trace == full()
    assert trace != "a trace"
    for name, value in vars(trace).items():
        if name in ("offsets", "prefill_offsets"):
            other = np.array([0, 1, value[-1]])
        elif name == "meta":
            other = {**value, "model": "other"}
        else:
            other = value.copy()
            other[1] = other[0]
        assert replace(trace, **{name: other}) != trace, name
    assert trace != replace(trace, tokens=trace.tokens.astype(np.int64)), "types count"  # type: ignore[union-attr]
    assert trace != replace(trace, tokens=None)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 400), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_any_trace_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, layers: int, experts: int, k: int, seed: int, wide: bool
) -> None:
    rng = np.random.default_rng(seed)
    k = min(k, experts)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[..., :k]
    dtype = np.uint16 if wide or experts > 255 else np.uint8
    fewer = rng.integers(1, k + 1, (tokens, layers, 1))
    ids = np.where(np.arange(k) < fewer, ids, np.iinfo(dtype).max).astype(dtype)
    trace = Trace(ids, np.array([0, tokens]), {"model": "m", "layers": layers, "experts": experts, "top_k": k})
    assert trace.padded == bool((fewer < k).any())
    path = tmp_path_factory.getbasetemp() / "any.npz"
    trace.save(path)
    assert Trace.load(path) == trace


def test_sequences_can_be_taken() -> None:
    trace = full()
    taken = trace.take([1])
    for name in ("experts", "probs", "tokens", "states", "logits"):
        assert np.array_equal(getattr(taken, name), getattr(trace, name)[3:]), name
    for name in ("prefill", "prefill_probs", "prefill_tokens"):
        assert np.array_equal(getattr(taken, name), getattr(trace, name)[2:]), name
    assert (taken.offsets.tolist(), taken.prompts.tolist(), taken.meta["classes"]) == ([0, 3], [0, 3], ["b"])
    assert trace.take([0, 1]) == trace
    assert trace.take([1, 0]).take([1, 0]) == trace
    bare = synthetic(6, 2, 8, 2, sequences=2)
    assert bare.take([0]).prefill is None
    for wrong in ([], [2], [-1]):
        with pytest.raises(ValueError, match="are not all of 0 to 1"):
            trace.take(wrong)


def test_a_trace_of_another_model_is_named() -> None:
    full().check_model("m", 2, 8, 2)
    for shape in ((3, 8, 2), (2, 9, 2), (2, 8, 1)):
        with pytest.raises(ValueError, match=r"is of synthetic, 2 layers of 8 experts, top 2, and m has "):
            full().check_model("m", *shape)


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
        ({"experts": GOOD[..., ::-1] * np.uint16(UNKNOWN)}, "experts holds an id behind padding at token 0, layer 0"),
        (
            {"experts": GOOD.astype(np.uint8), "meta": {**META, "experts": 256}},
            "experts is uint8, whose 255 means no expert: 256 experts need uint16",
        ),
        ({"meta": {**META, "classes": ["a", "b"]}}, "meta's classes must be a name a sequence, 1 in all"),
        ({"meta": {**META, "classes": [1]}}, "meta's classes"),
        ({"tokens": np.zeros(5, int)}, "tokens must be whole numbers [6], found int64 [5]"),
        ({"tokens": np.zeros(6)}, "tokens must be whole numbers [6], found float64 [6]"),
        ({"prefill_tokens": np.zeros(1, int)}, "prefill_tokens must be whole numbers [0]"),
        ({"prefill_probs": np.zeros((1, 2, 2), np.float16)}, "prefill_probs must be finite float16 [0, 2, 2]"),
        ({"states": np.zeros((5, 2, 3), np.float16)}, "states must be finite float16 [6, 2, 3]"),
        ({"states": np.zeros((), np.float16)}, "states must be finite float16 [6, 2, 0]"),
        ({"logits": np.zeros((6, 2, 7), np.float16)}, "logits must be finite float16 [6, 2, 8]"),
        ({"gates": np.zeros((2, 8, 4), np.float16)}, "gates must be finite float16 [2, 8, 0]"),
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


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    for shape, words in (((10**12, 2, 2), "experts.npy claims uint16 [1000000000000, 2, 2] and holds 48 bytes"),
                         ((5, 2, 2), "holds 48 bytes"), ((7, 2, 2), "holds 48 bytes"), ((-6, 2, 2), "")):  # fmt: skip
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(io.BytesIO(CONTENT)) as good:
            for name in good.namelist():
                whole = good.read(name)
                archive.writestr(name, header.getvalue() + GOOD.tobytes() if name == "experts.npy" else whole)
        refused(path, words)


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
    path = SHARED / f"traces/{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    trace = Trace.load(path)
    assert len(trace.offsets) == {"gpt-oss-20b": 134, "qwen3-30b-a3b-top6": 2}[name]
    assert trace.probs is not None
    assert (trace.prefill is None) == (name == "gpt-oss-20b")
