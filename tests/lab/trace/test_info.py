"""Statistics of traces, compared with hand-computed ones and with the construction of synthetic traces."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from paths import DATA, SHARED
from rich.console import Console
from synthetic_traces import of, synthetic

from offmoe.cache.trace import Trace
from offmoe.lab.trace.info import LAGS, WINDOWS, as_dict, examine, token_kind
from offmoe.lab.trace.plot import draw
from offmoe.lab.trace.table import tables

GPT_OSS = SHARED / "traces/gpt-oss-20b.npz"


def test_load_by_hand() -> None:
    """One layer of 8 experts, top 2: uses 3, 2, 1, 2 and four that are never used."""
    facts = examine(of([[0, 1], [0, 1], [0, 2], [3, 4]], 8))
    assert facts.load[0] == pytest.approx(np.array([3, 2, 1, 1, 1, 0, 0, 0]))
    assert facts.hottest[0] == pytest.approx(5 / 8), "a quarter of 8 experts is two"
    assert facts.dead[0] == 3
    share = np.array([3, 2, 1, 1, 1]) / 8
    assert facts.entropy[0] == pytest.approx(-(share * np.log2(share)).sum() / 3)
    assert facts.uniform == 0.25


def test_reuse_and_working_sets_by_hand() -> None:
    facts = examine(of([[0, 1], [0, 1], [0, 2], [3, 4]], 8))
    assert facts.reuse[LAGS.index(1), 0] == pytest.approx((2 + 1 + 0) / 6)
    assert facts.reuse[LAGS.index(2), 0] == pytest.approx((1 + 0) / 4)
    assert np.isnan(facts.reuse[LAGS.index(4), 0])
    assert facts.popular[0] == pytest.approx((9 + 4 + 1 + 1 + 1) / 4 / 8)
    assert facts.working[WINDOWS.index(2), 0] == pytest.approx((2 + 3 + 4) / 3)
    assert facts.working[WINDOWS.index(4), 0] == 5
    assert np.isnan(facts.working[WINDOWS.index(8), 0])


def test_nothing_reaches_over_a_sequence() -> None:
    """Two sequences, each with an expert of its own."""
    trace = replace(of([[0], [0], [1], [1]], 2), offsets=np.array([0, 2, 4]))
    facts = examine(trace)
    assert facts.reuse[0, 0] == 1
    assert facts.working[WINDOWS.index(2), 0] == 1
    assert np.isnan(facts.reuse[LAGS.index(2), 0])


def test_padding_is_nobody() -> None:
    ids = np.array([[[0, 1]], [[0, 255]], [[0, 255]]], np.uint8)
    trace = Trace(ids, np.array([0, 3]), {"model": "m", "layers": 1, "experts": 4, "top_k": 2})
    facts = examine(trace)
    assert facts.load[0] == pytest.approx(np.array([3, 1, 0, 0]))
    assert facts.reuse[0, 0] == pytest.approx(2 / 3), "of 3 asked for, 2 come again"


def labelled(experts: list[list[int]], count: int, pieces: list[str]) -> Trace:
    trace = of(experts, count)
    names = {str(i): piece for i, piece in enumerate(pieces)}
    return replace(trace, tokens=np.arange(len(experts)), meta={**trace.meta, "pieces": names})


def test_an_expert_for_every_kind_of_token_tells_all_of_it() -> None:
    way = examine(labelled([[0], [1]] * 100, 2, [" word", "7"] * 100)).classifications[1]
    assert way.name == "token"
    assert way.labels == ["digits", "word"]
    assert way.information[0] == pytest.approx(1)
    assert way.entropy == pytest.approx(1)
    assert way.control[0] < 0.02
    assert way.known[0] == pytest.approx(1, abs=0.02)
    assert way.specialist("digits") == (0, 1, 2.0)


def test_chance_is_known_by_the_shuffled_control() -> None:
    """A few tokens of many classes seem to give much information."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 16, (120, 1)).tolist()
    pieces = rng.choice([" a", "1", ".", "\n", "é", "x"], 120).tolist()
    way = examine(labelled(ids, 16, pieces)).classifications[1]
    assert way.information[0] > 0.2
    assert abs(way.known[0]) < 0.05


def test_prompts_are_shuffled_whole() -> None:
    """Each of two sequences has its expert, and its class by chance: there is no information beyond that."""
    trace = of([[0]] * 50 + [[1]] * 50, 2)
    trace = replace(trace, offsets=np.array([0, 50, 100]), meta={**trace.meta, "classes": ["a", "b"]})
    way = examine(trace).classifications[-1]
    assert way.name == "prompt"
    assert way.information[0] == pytest.approx(1)
    assert way.known[0] == pytest.approx(0)


@pytest.mark.parametrize(
    ("piece", "kind"),
    [(" the", "word"), ("ing", "inside a word"), ("42", "digits"), (" 7", "digits"), (".", "punctuation"),
     ('("', "punctuation"), ("\n\n", "newline"), ("  ", "space"), ("", "special"), ("é", "other script"),
     ("猫", "other script"), ("x1", "inside a word"), ("₂", "digits"), ("→", "punctuation")],
)  # fmt: skip
def test_kinds_of_tokens(piece: str, kind: str) -> None:
    assert token_kind(piece) == kind


def test_everything_can_be_written_as_json() -> None:
    facts = as_dict(examine(synthetic(60, 3, 16, 4, sequences=2)))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert len(facts["reuse"]["16"]) == 3
    assert facts["working_set"]["256"] == [None, None, None], "no sequence is as long"


@pytest.mark.parametrize("trace", [of([[0]], 1), of([[1], [0]], 2), synthetic(3, 1, 5, 5), synthetic(70, 2, 300, 1)])
def test_the_smallest_traces_are_shown_too(trace: Trace) -> None:
    pytest.importorskip("matplotlib")
    facts = examine(trace)
    json.dumps(as_dict(facts), allow_nan=False)
    console = Console(width=160, file=io.StringIO())
    console.print(*tables(facts))
    assert "nan" not in console.file.getvalue()  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(facts).startswith(b"\x89PNG")


def test_the_shared_trace_has_the_published_reuse() -> None:
    if not GPT_OSS.exists():
        pytest.skip(f"{GPT_OSS} is absent")
    facts = examine(Trace.load(GPT_OSS))
    assert facts.reuse[0].mean() == pytest.approx(0.438, abs=0.01)
    assert facts.uniform == 0.125


def test_the_trace_of_the_demo_is_what_the_documentation_says() -> None:
    trace = Trace.load(DATA / "demo_chat_trace.npz")
    facts = examine(trace)
    assert (facts.tokens, facts.sequences, len(set(trace.meta["classes"]))) == (4000, 33, 10)
    assert facts.reuse[0].mean() == pytest.approx(0.462, abs=5e-4)
    assert facts.popular.mean() == pytest.approx(0.326, abs=5e-4)
    assert facts.hottest.mean() == pytest.approx(0.315, abs=5e-4)
    assert [way.name for way in facts.classifications] == ["position", "token", "prompt"]
    assert 0.1 < facts.classifications[1].known.mean() < 0.13, "what kind of token it is"
    assert facts.classifications[2].control.mean() > 0.05, "sequences differ, whatever they are called"
