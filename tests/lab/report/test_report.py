"""Statements of a report: gains and noise, the fit, agreement with the replay, and figures of unusual data."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_traces import synthetic

from offmoe.cache.ahead import Pace
from offmoe.cache.trace import Trace
from offmoe.lab.live.folder import Cell, Folder
from offmoe.lab.live.results import Configuration, Measured
from offmoe.lab.report import plots
from offmoe.lab.report.curves import curves
from offmoe.lab.report.markdown import agreement, as_csv, report, rows, table, verdicts
from offmoe.lab.report.numbers import Results, drifts, fit, fit_summaries, gains, paired_gain, summaries, t95
from offmoe.lab.report.predictors import (
    GATE,
    ORACLE,
    PREVIOUS,
    SHUFFLED,
    Prediction,
    Predictions,
    comparison,
    load_predictions,
    predictions,
    save_predictions,
)
from offmoe.lab.report.write import write_report

GOOD = Measured(
    vram="50%", policy="lru", prefetch="none", slots=24, tokens=100, prompts=2, seconds=1.0, routed=12, hit_rate=0.5,
    covered=0.0, late=0.0, misses=6.0, uploads=6.0, stall_ms=2.0, simulated=0.5, same_misses=True, roof_ms=5.0,
    parts={"attention": 3.0, "experts": 4.0, "page-in": 2.0, "rest": 1.0}, hits_by_layer=[0.4, 0.5, 0.6],
    roof="floor", token_bytes=1e6, prompt_tok_s=100.0,
)  # fmt: skip
ABOUT: dict[str, Any] = {
    "model": "m.gguf", "machine": "1 × CPU", "device": "cpu", "version": "1", "date": "2026-01-01", "rounds": 3,
    "warm_up": 8, "notes": ["a note"], "bandwidths": {"slots": 1e9, "link": 1e9}, "record_bytes": 1e5, "records": 48,
    "scope": "layer",
}  # fmt: skip


def of(times: dict[str, list[tuple[float, ...]]], **changes: Any) -> Results:
    """Return results from ms per token and round: a baseline twice (first and again), other methods once.

    "50% lru": [(10, 10.1), …].
    """
    results: Results = {}
    for name, rounds in times.items():
        vram, policy = name.split()
        for turn, round_times in enumerate(rounds):
            for again, ms in enumerate(round_times):
                cell = Cell(len(results), turn, Configuration(vram, policy), bool(again))
                results[cell] = replace(GOOD, vram=vram, policy=policy, seconds=ms / 10, **changes)
    return results


# Gains.


def test_a_gain_is_paired_round_by_round() -> None:
    """Rounds of very different speed, always 10 % faster: the load of the machine cancels out."""
    gain, spread = paired_gain([(10.0, 10.0, 9.0), (30.0, 30.0, 27.0), (5.0, 5.0, 4.5)])
    assert gain == pytest.approx(0.1)
    assert spread == pytest.approx(0, abs=1e-12)


def test_the_spread_is_the_pairs_scatter() -> None:
    """By hand: gains 0.1, 0.2, 0.3; stdev 0.1; t(2) = 4.30."""
    gain, spread = paired_gain([(10, 10, 9), (10, 10, 8), (10, 10, 7)])
    assert gain == pytest.approx(0.2)
    assert spread == pytest.approx(4.30 * 0.1 / math.sqrt(3))


def test_a_baseline_that_differs_from_itself_widens_the_spread() -> None:
    """Both runs of the baseline are the same configuration, so 10 % between them is noise: t(4) = 2.78."""
    same = [(10 / 1.05 * 1.0, 10 / 1.05 * 1.1, 9.0)] * 4
    gain, spread = paired_gain(same)
    assert gain == pytest.approx(0.1)
    assert spread == pytest.approx(2.78 * math.sqrt(0.75 * 0.1**2) / 2)
    assert spread > gain, "noise"


def test_one_round_proves_nothing() -> None:
    (gain,) = gains(of({"50% lru": [(10, 10)], "50% lfu": [(5,)]}))
    assert math.isinf(gain.spread)
    assert gain.verdict == "noise"
    assert str(gain) == "+50.0% of one round: noise"


def test_the_report_calls_noise_noise() -> None:
    results = of(
        {
            "50% lru": [(10, 10.4), (10.2, 10), (10, 9.8)],
            "50% lfu": [(9.9,), (9.8,), (9.9,)],  # 1 to 3 % less, and the baseline differs from itself by 4
            "50% lfru": [(8,), (8.1,), (7.9,)],
            "50% random": [(14,), (14.1,), (13.9,)],
        }
    )
    noise, faster, slower = gains(results)
    assert [gain.verdict for gain in (noise, faster, slower)] == ["noise", "faster", "slower"]
    lines = verdicts([noise, faster, slower])
    assert "**noise**" in lines[0]
    assert "lfru takes less time than lru" in lines[1]
    assert "random takes more time than lru" in lines[2]
    text = report(ABOUT, results, {}, [])
    assert "against lru: **noise**" in text


def test_budgets_have_baselines_of_their_own() -> None:
    results = of({"50% lru": [(10, 10)] * 3, "50% lfu": [(9,)] * 3, "75% lru": [(6, 6)] * 3, "75% lfu": [(9,)] * 3})
    assert [round(gain.gain, 3) for gain in gains(results)] == [0.1, -0.5]


def test_a_round_without_its_repeat_is_left_out() -> None:
    (gain,) = gains(of({"50% lru": [(10, 10), (10, 10), (99,)], "50% lfu": [(9,), (9,), (1,)]}))
    assert gain.rounds == 2
    assert gain.gain == pytest.approx(0.1)


def test_drift_is_again_against_first() -> None:
    (drift,) = drifts(of({"50% lru": [(10, 11), (10, 9)], "50% lfu": [(9,), (9,)]}))
    assert drift.changes == pytest.approx((0.1, -0.1))


def test_few_rounds_need_a_large_t() -> None:
    assert math.isinf(t95(0))
    assert t95(1) == 12.71
    assert t95(1000) == 2.0
    assert [t95(n) for n in range(1, 16)] == sorted((t95(n) for n in range(1, 16)), reverse=True)


# The fit.


def test_the_fit_finds_what_was_put_in() -> None:
    rng = np.random.default_rng(0)
    points = [(5 + 0.2 * m + 0.05 * u, m, u) for m, u in rng.uniform(0, 100, (7, 2)).tolist()]
    found = fit(points)
    assert found is not None
    assert (found.a, found.b, found.c) == pytest.approx((5, 0.2, 0.05))
    assert found.residual == pytest.approx(0, abs=1e-9)


def test_where_uploads_are_misses_their_costs_are_not_told_apart() -> None:
    found = fit([(5 + 0.2 * m, m, m) for m in (0.0, 10.0, 20.0, 30.0, 40.0)])
    assert found is not None
    assert (found.a, found.b, found.c) == pytest.approx((5, 0.2, None))


def test_the_residual_is_in_ms() -> None:
    found = fit([(1.0, 0, 0), (3.0, 0, 0), (1.0, 0, 0), (3.0, 0, 0), (1.0, 10, 10), (3.0, 10, 10)])
    assert found is not None
    assert found.residual == pytest.approx(1.0)


def test_four_configurations_are_not_fitted() -> None:
    assert fit([(1.0, 1, 1)] * 4) is None
    results = of({"50% lru": [(10, 10)], "50% lfu": [(9,)]})
    assert fit_summaries(summaries(results)) is None
    assert "Not fitted: 2 configurations, and at least 5 are needed." in report(ABOUT, results, {}, [])


# Agreement of the replay.


@pytest.mark.parametrize(("simulated", "agrees"), [(0.5, True), (0.509, True), (0.511, False), (0.489, False)])
def test_the_replay_agrees_within_a_point(simulated: float, agrees: bool) -> None:
    (summary,) = summaries(of({"50% lru": [(10, 10)]}, simulated=simulated))
    assert summary.agrees is agrees
    lines = "\n".join(agreement([summary]))
    assert ("**No result of a replay can be trusted" in lines) is not agrees
    assert ("differ by at most" in lines) is agrees


def test_errors_that_cancel_are_seen() -> None:
    """One round is too high, one too low: both count."""
    results = of({"50% lru": [(10,), (10,)]})
    cells = list(results)
    results[cells[0]] = replace(GOOD, simulated=0.53)
    results[cells[1]] = replace(GOOD, simulated=0.47)
    (summary,) = summaries(results)
    assert summary.simulated == pytest.approx(0.5)
    assert not summary.agrees


def test_what_was_not_replayed_is_said() -> None:
    results = of({"50% lru": [(10, 10)]}, simulated=None, same_misses=None)
    assert "Not replayed, because a live run does not record predictions" in "\n".join(agreement(summaries(results)))
    assert rows(summaries(results), [])[0][6] == "–"


def test_the_terminal_shows_a_wrong_replay_in_red() -> None:
    from rich.console import Console

    results = of({"50% lru": [(10, 10)]}, simulated=0.6)
    screen = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="standard")
    screen.print(table(summaries(results), []))
    assert "\x1b[1;31m60.00%" in screen.file.getvalue()  # type: ignore[attr-defined]


# Files.


def test_time_is_the_median_rounds_and_rates_count_by_tokens() -> None:
    cells = [Cell(i, i, Configuration("50%", "lru")) for i in range(2)]
    results = {cells[0]: replace(GOOD, tokens=300, seconds=3.0, hit_rate=0.8), cells[1]: replace(GOOD, seconds=2.0)}
    (summary,) = summaries(results)
    assert summary.ms == pytest.approx(10), "the lower of two in the middle"
    assert summary.mean("hit_rate") == pytest.approx((0.8 * 300 + 0.5 * 100) / 400)


def test_the_csv_has_a_line_a_measurement() -> None:
    results = of({"50% lru": [(10, 11), (12, 13)], "50% lfu": [(9,), (9,)]})
    lines = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert len(lines) == 6
    assert [(line["ms"], line["round"], line["again"]) for line in lines[:3]] == [
        ("10", "0", "False"), ("11", "0", "True"), ("12", "1", "False"),
    ]  # fmt: skip
    assert lines[0]["page-in_ms"] == "2"
    assert lines[0]["hit_rate"] == "0.5"


def test_belady_is_below_all_curves() -> None:
    found = {curve.policy: curve for curve in curves(synthetic(60, 3, 16, 4), ["lru", "crf:h=16"], "layer")}
    assert list(found) == ["lru", "crf:h=16", "belady", "belady-bypass"]
    assert found["lru"].slots[0] == 4
    assert found["lru"].slots[-1] == 16
    for policy in ("lru", "crf:h=16"):
        assert all(np.array(found["belady"].misses) <= found[policy].misses)
    assert all(np.array(found["belady-bypass"].misses) <= found["belady"].misses)


def results_of(kind: str) -> Results:
    """Runs that figures must be able to draw."""
    many = {
        f"{v}% {p}": [(10.0, 10.5)] * 2 if p == "lru" else [(9.0,)] * 2 for v in (25, 50) for p in ("lru", "crf:h=16")
    }
    if kind == "gpu":
        parts = {"everything hits": 7.0, "stall": 3.0}
        return of(many, parts=parts, hits_by_layer=[], simulated=None, same_misses=None)
    if kind == "one":
        return of({"100% lru": [(10, 10)]}, hit_rate=1.0, misses=0.0, uploads=0.0)
    return of(many)


def knowing(seed: int, tokens: int = 30) -> Trace:
    """Return states that are the next layer's logits, so that a gate can predict, or other states."""
    trace = synthetic(tokens, 3, 16, 4, seed=3)
    rng = np.random.default_rng(seed)
    states = rng.normal(0, 1, (tokens, 3, 16)).astype(np.float16)
    if seed == 0:
        for layer in range(2):
            np.put_along_axis(states[:, layer], trace.experts[:, layer + 1].astype(np.int64), 9.0, 1)
    gates = np.stack([np.eye(16, dtype=np.float16)] * 3)
    return replace(trace, states=states, gates=gates)


def replayed(seed: int = 0) -> list[Prediction]:
    return predictions(knowing(seed), "lru", 8, "layer", Pace(), lambda *_: None)


def test_every_predictor_stands_beside_its_controls() -> None:
    found = replayed()
    families = {one.family for one in found}
    assert {SHUFFLED, PREVIOUS, ORACLE} <= families
    gates = {one.name for one in found if one.family == GATE}
    assert {f"shuffled:{name}" for name in gates} == {one.name for one in found if one.family == SHUFFLED}
    best = max(one.coverage or 0 for one in found if one.family == GATE)
    assert best > 2 * max(one.coverage or 0 for one in found if one.family == SHUFFLED)
    (oracle,) = (one for one in found if one.family == ORACLE)
    assert oracle.precision == 1
    (previous,) = (one for one in found if one.family == PREVIOUS)
    assert previous.fetched == 0, "what the last token used is resident already"


def test_a_gate_that_knows_nothing_is_said_to() -> None:
    knows = Predictions("50%", "lru", 30, tuple(replayed()))
    assert "The gate covers more than its shuffled control" in comparison(knows)[0]
    blind = [replace(one, coverage=0.1) if one.family in (GATE, SHUFFLED) else one for one in knows.entries]
    assert comparison(replace(knows, entries=tuple(blind))) == [
        "**The gate covers no more than its shuffled control: it predicts nothing here.**"
    ]


def test_predictions_are_kept(tmp_path: Path) -> None:
    folder, found = Folder(tmp_path, {"a": 1}), Predictions("50%", "lru", 30, tuple(replayed()))
    assert load_predictions(folder) is None
    save_predictions(folder, found)
    assert load_predictions(folder) == found
    for content in ("", "[]", '{"run": "other"}', '{"run": "' + folder.key + '", "entries": [1]}'):
        (tmp_path / "predictors.json").write_text(content)
        assert load_predictions(folder) is None


@pytest.mark.parametrize("kind", ["cpu", "gpu", "one"])
def test_a_report_is_written_whole(tmp_path: Path, kind: str) -> None:
    results = results_of(kind)
    folder = Folder(tmp_path / "run", {})
    predicted = None if kind == "one" else Predictions("50%", "lru", 30, tuple(replayed()))
    write_report(folder, ABOUT, results, synthetic(30, 3, 16, 4), predicted)
    text = (folder.path / "report.md").read_text()
    for file in ("latency.png", "stack.png", "layers.png", "misses.png"):
        assert f"({file})" in text
        assert (folder.path / file).read_bytes().startswith(b"\x89PNG")
    assert len(list(csv.reader((folder.path / "latency.csv").open()))) == len(results) + 1
    if kind == "one":
        assert "there is no room for prefetching" in text
        assert "predictors.png" not in text
    else:
        assert "control, `shuffled:gate" in text
        assert "control, `previous:" in text
        assert "control, `oracle:" in text
        assert (folder.path / "predictors.png").read_bytes().startswith(b"\x89PNG")


def test_the_roof_is_the_slowest_resource() -> None:
    """By hand: floor 10 − 2 = 8 ms; at a miss rate of 1 the link needs 12 · 1e5 ÷ 1e8 s = 12 ms."""
    found = summaries(of({"50% lru": [(10, 10)]}))
    slow = {"slots": 1e9, "link": 1e8}
    assert plots.roof_ms(found, slow, 1e5, 1.0) == pytest.approx(12)
    assert plots.roof_ms(found, slow, 1e5, 0.0) == pytest.approx(8)
    assert plots.roof_ms(found, {"slots": 1e6 / 0.02, "link": 1e8}, 1e5, 0.0) == pytest.approx(20)
