"""`offmoe bench policies`: rows, errors and the table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from paths import DATA, SHARED
from synthetic_traces import of, seeing, synthetic

from offmoe.app.cli import explain
from offmoe.cache.replay import replay
from offmoe.cache.trace import Trace
from offmoe.errors import OffmoeError
from offmoe.lab.policies.cli import policies

SMALL, DEMO = str(DATA / "small_trace.npz"), str(DATA / "demo_trace.npz")
PROMISED = {"policy", "scope", "slots", "hit_rate", "misses_per_token", "uploads_per_token", "gap_captured"}


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(policies, arguments, standalone_mode=False)


def rows(*arguments: str) -> list[dict[str, Any]]:
    result = bench(*arguments, "--json")
    assert result.exception is None, result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def refusal(*arguments: str) -> str:
    """Return the one-line error."""
    error = bench(*arguments).exception
    assert isinstance(error, OffmoeError), repr(error)
    line = explain(error)
    assert line
    assert "\n" not in line
    return line


def test_a_row_says_what_the_replay_found() -> None:
    found = rows(SMALL, "--slots", "8", "--policy", "crf:h=16")
    assert [row["policy"] for row in found] == ["crf:h=16", "lru", "belady", "belady-bypass"]
    trace = Trace.load(SMALL)
    for row in found:
        assert set(row) >= PROMISED
        outcome = replay(trace, row["policy"], 8)
        assert row["hit_rate"] == outcome.hit_rate
        assert row["misses_per_token"] == outcome.misses_per_token
        assert row["uploads_per_token"] == outcome.uploads_per_token
        assert row["hit_rate_first_64"] == outcome.hit[:64].mean()
        assert row["hit_rate_after_64"] == outcome.hit[64:].mean()
        assert (row["scope"], row["slots"], row["tokens"], row["prefetch"]) == ("layer", 8, 1000, "none")
        assert (row["trace"], row["model"]) == ("small_trace.npz", "synthetic")


def test_the_gap_goes_from_lru_to_belady() -> None:
    found = {row["policy"]: row for row in rows(SMALL, "--slots", "8", "--policy", "crf:h=16")}
    h, lru, best = (found[name]["hit_rate"] for name in ("crf:h=16", "lru", "belady"))
    assert found["crf:h=16"]["gap_captured"] == (h - lru) / (best - lru)
    assert 0 < found["crf:h=16"]["gap_captured"] < 1 < found["belady-bypass"]["gap_captured"]
    assert (found["lru"]["gap_captured"], found["belady"]["gap_captured"]) == (0, 1)


def test_where_there_is_no_gap_there_is_none_to_capture(tmp_path: Path) -> None:
    of([[0, 1]] * 3, 4).save(tmp_path / "t.npz")
    assert {row["gap_captured"] for row in rows(str(tmp_path / "t.npz"), "--slots", "2")} == {None}


def test_everything_that_is_named_is_combined() -> None:
    found = rows(SMALL, DEMO, "--tokens", "20", "--slots", "12", "--fraction", "0.5", "--slots", "12",
                 "--scope", "global", "--scope", "layer", "--policy", "lru", "--policy", "lfu",
                 "--policy", "lru")  # fmt: skip
    assert [(r["trace"], r["scope"], r["slots"], r["policy"]) for r in found] == [
        (trace, scope, slots, policy)
        for trace in ("small_trace.npz", "demo_trace.npz") for scope in ("global", "layer")
        for slots in (12, 16) for policy in ("lru", "lfu", "belady", "belady-bypass")
    ]  # fmt: skip
    assert {row["tokens"] for row in found} == {20}
    assert {row["hit_rate_after_64"] for row in found} == {None}


def test_what_is_taken_where_nothing_is_named() -> None:
    found = rows(SMALL, "--tokens", "80")
    assert {row["slots"] for row in found} == {8, 16}
    assert [row["policy"] for row in found if row["slots"] == 8] == [
        "random:seed=0", "lru", "lfu", "lfru", "slru:p=80", "crf:h=16", "crf:h=64", "crf+tinylfu:h=64",
        "echo:h=16,w=2048", "belady", "belady-bypass",
    ]  # fmt: skip
    assert {row["slots"] for row in rows(DEMO, "--tokens", "5", "--policy", "lru")} == {10, 16}  # k = 10


def test_layers_are_shown_on_demand() -> None:
    (row, *_) = rows(SMALL, "--slots", "8", "--policy", "lru", "--per-layer")
    assert row["hit_rate_by_layer"] == np.round(replay(Trace.load(SMALL), "lru", 8).hit_rate_by_layer, 6).tolist()
    assert "hit_rate_by_layer" not in rows(SMALL, "--slots", "8", "--policy", "lru")[0]
    shown = bench(SMALL, "--slots", "8", "--policy", "lru", "--per-layer").stdout
    assert "hit rate by layer, layer 8" in shown
    assert f"    0  {row['hit_rate_by_layer'][0]:.1%}" in shown


def test_the_table_has_a_line_a_row_with_the_bounds() -> None:
    shown = bench(SMALL, "--slots", "8", "--policy", "crf:h=16", "--prefetch", "none", "--prefetch", "markov").stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    outcome = replay(Trace.load(SMALL), "crf:h=16", 8)
    assert any(line.startswith(f"layer 8 crf:h=16 none {outcome.hit_rate:.1%}") for line in lines)
    assert any(line.startswith("layer 8 crf:h=16 markov:d=1,p=0.05,n=2") for line in lines)
    assert any(line.startswith("layer 8 belady none") for line in lines)
    assert any(line.startswith("layer 8 belady-bypass none") for line in lines)
    assert "coverage" in shown
    assert "\x1b" not in shown
    assert "coverage" not in bench(SMALL, "--slots", "8", "--policy", "lru").stdout


def test_predictors_stand_beside_what_they_cost(tmp_path: Path) -> None:
    seeing(synthetic(80, 4, 12, 3, seed=1)).save(path := tmp_path / "states.npz")
    found = rows(str(path), "--slots", "6", "--policy", "lru", "--prefetch", "gate:n=3",
                 "--prefetch", "shuffled:gate:n=3", "--prefetch", "oracle",
                 "--prefetch", "previous", "--prefetch", "none")  # fmt: skip
    by = {row["prefetch"]: row for row in found if row["policy"] == "lru"}
    assert by["gate:d=1,p=0.05,n=3"]["precision"] > by["shuffled:gate:d=1,p=0.05,n=3"]["precision"]
    assert by["oracle:d=1,p=0.05,n=2"]["precision"] == 1
    assert by["previous:d=1,p=0.05,n=2"]["fetched_per_token"] == 0
    assert "coverage" not in by["none"]
    assert not {"timely", "stall_ms_per_token"} & by["oracle:d=1,p=0.05,n=2"].keys()  # copies take no time
    assert {row["prefetch"] for row in found if row["policy"].startswith("belady")} == {"none"}


def test_a_link_makes_copies_take_time() -> None:
    # 1 MB at 1 GB/s: 1 ms a miss; layers of 0.25 ms
    found = rows(SMALL, "--tokens", "50", "--slots", "8", "--policy", "lru", "--link", "1GB", "--record", "1MB",
                 "--floor", "1", "--prefetch", "none", "--prefetch", "oracle")  # fmt: skip
    plain, oracle = found[:2]
    assert plain["stall_ms_per_token"] == pytest.approx(plain["misses_per_token"])
    assert oracle["stall_ms_per_token"] < plain["stall_ms_per_token"]
    assert oracle["timely"] == 0  # a copy takes four layers
    assert oracle["late_per_token"] > 0
    for row in (plain, oracle):
        assert row["upload_bytes_per_token"] == 1e6 * row["uploads_per_token"]
        assert row["wasted_bytes_per_token"] == 1e6 * row["wasted_per_token"]


def test_bytes_are_counted_where_a_record_has_a_size(tmp_path: Path) -> None:
    asked = ("--slots", "8", "--policy", "lru")
    (row, *_) = rows(SMALL, *asked, "--record", "3k")
    assert row["upload_bytes_per_token"] == 3072 * row["uploads_per_token"]
    assert "upload_bytes_per_token" not in rows(SMALL, *asked)[0]
    trace = Trace.load(SMALL)
    Trace(trace.experts, trace.offsets, {**trace.meta, "record_bytes": 100}).save(tmp_path / "t.npz")
    assert rows(str(tmp_path / "t.npz"), *asked)[0]["upload_bytes_per_token"] == 100 * row["uploads_per_token"]
    Trace(trace.experts, trace.offsets, {**trace.meta, "record_bytes": "big"}).save(tmp_path / "t.npz")
    assert "an expert of 'big' bytes is not possible" in refusal(str(tmp_path / "t.npz"))


def test_a_link_is_measured_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.machine.bandwidth.copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = rows(SMALL, "--tokens", "20", "--slots", "8", "--policy", "lru", "--link", "measure", "--record", "1MB")
    assert found[0]["stall_ms_per_token"] == pytest.approx(found[0]["misses_per_token"])


def test_csv_holds_the_same_rows(tmp_path: Path) -> None:
    asked = (SMALL, "--slots", "8", "--policy", "lru", "--per-layer", "--prefetch", "none", "--prefetch", "oracle")
    found = rows(*asked, "--csv", str(tmp_path / "t.csv"))
    with (tmp_path / "t.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(found)
    for line, row in zip(written, found, strict=True):
        assert {key: value for key, value in line.items() if value} == {
            key: " ".join(map(str, value)) if isinstance(value, list) else str(value)
            for key, value in row.items() if value is not None
        }  # fmt: skip
    assert os.listdir(tmp_path) == ["t.csv"]


def test_a_global_pool_that_is_too_small_is_warned_of() -> None:
    result = bench(SMALL, "--slots", "3", "--scope", "global", "--policy", "lru", "--policy", "least-stale", "--json")
    assert "a global pool of 3 slots per layer is smaller than what one token uses: lru will never hit" in result.stderr
    by = {row["policy"]: row["hit_rate"] for row in map(json.loads, result.stdout.splitlines())}
    assert by["lru"] == 0 < by["least-stale"] < by["belady"]
    assert not bench(SMALL, "--slots", "4", "--scope", "global", "--policy", "lru").stderr


def test_a_plugin_says_where_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from offmoe.cache.policies.formula import Formula\n"
        "class Mine(Formula):\n    @staticmethod\n    def worth(value, age):\n        return value / (age + 1)\n"
    )
    result = bench(SMALL, "--slots", "8", "--policy", f"{path}:Mine", "--policy", "lfru", "--json")
    assert not result.stderr, "a formula scores everywhere"
    mine, lfru, *_ = map(json.loads, result.stdout.splitlines())
    assert mine["policy"] == f"{path}:Mine"
    assert mine["hit_rate"] == lfru["hit_rate"]  # the same rule
    path.write_text(
        "from offmoe.cache.policies.base import Policy\n"
        "class Mine(Policy):\n    def touch(self, records, now, uses=1):\n        pass\n"
        "    def score(self, records, now):\n        return 0.0 * records\n"
    )
    said = bench(SMALL, "--slots", "8", "--policy", f"{path}:Mine").stderr
    assert f"{path}:Mine: no GPU kernel evaluates its score, so it runs only in replay and on the CPU" in said


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    path = str(tmp_path / "t.npz")
    trace = synthetic(10, 2, 8, 2)
    whole = {"experts": trace.experts, "offsets": trace.offsets, "meta": json.dumps(trace.meta)}
    for changed, words in (
        ({"offsets": np.array([0, 4, 4, 10])}, "a sequence is empty"),
        ({"experts": trace.experts[:0], "offsets": np.array([0, 0])}, "experts must be uint8 or uint16"),
        ({"experts": trace.experts[..., :1]}, "experts must be uint8 or uint16 [tokens, 2, 2]"),
        ({"experts": trace.experts + 7}, "experts holds an id above 7"),
    ):
        np.savez(path, **(whole | changed))  # type: ignore[arg-type]
        assert words in refusal(path)
    trace.save(path)
    Path(path).write_bytes(Path(path).read_bytes()[:-30])
    assert "is no routing trace" in refusal(path)
    assert "nowhere.npz" in refusal(SMALL, str(tmp_path / "nowhere.npz"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "fifo"], "policy 'fifo' is unknown: choose lru, crf:h=1…4096"),
        (["--policy", "lru", "--prefetch", "fog"], "prefetch 'fog' is unknown"),
        (["--prefetch", "gate"], "the trace has none: record it with --states"),
        (["--slots", "3"], "3 slots a layer are too few: every token needs 4"),
        (["--fraction", "0.05"], "2 slots a layer are too few: every token needs 4"),
        (["--policy", f"static:profile={DEMO}"], "is of 960 records and 128 are needed: record it with this model"),
        (["--link", "1GB"], "--link needs --record"),
        (["--link", "fast", "--record", "1MB"], "'fast' is not a size"),
        (["--link", "0", "--record", "1MB"], "--link '0' is not a bandwidth"),
        (["--record", "0"], "an expert of 0 bytes is not possible"),
        (["--floor", "1"], "--floor needs --link"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert words in refusal(SMALL, *arguments, "--csv", str(out))
    assert not out.exists()


def test_a_plugin_that_fails_on_the_way_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from offmoe.cache.policies.formula import Formula\n"
        "class Mine(Formula):\n    @staticmethod\n    def worth(value, age):\n        return value * float('nan')\n"
    )
    assert "score() gave nan for record" in refusal(SMALL, "--slots", "8", "--policy", f"{path}:Mine")


def test_the_command_is_there_and_its_errors_are_one_line() -> None:
    program = [str(Path(sys.executable).with_name("offmoe")), "bench", "policies"]
    good = subprocess.run(
        [*program, SMALL, "--slots", "8", "--policy", "lru", "--json"], capture_output=True, timeout=120
    )
    assert good.returncode == 0, good.stderr
    assert len(good.stdout.splitlines()) == 3
    bad = subprocess.run([*program, SMALL, "--policy", "fifo"], capture_output=True, timeout=120)
    assert (bad.returncode, bad.stderr.count(b"\n")) == (1, 1)
    assert bad.stderr.startswith(b"offmoe: policy 'fifo' is unknown")
    usage = subprocess.run(program, capture_output=True, timeout=120)
    assert usage.returncode == 2


@pytest.mark.slow
def test_the_table_of_the_shared_trace() -> None:
    """The hit rates in its README, within a percentage point."""
    path = SHARED / "traces/gpt-oss-20b.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    found = rows(str(path), "--slots", "4", "--slots", "8", "--slots", "16", "--policy", "crf:h=16")
    by = {(row["policy"], row["slots"]): 100 * row["hit_rate"] for row in found}
    for policy, figures in (
        ("lru", (43.7, 64.8, 90.0)), ("crf:h=16", (43.7, 69.2, 91.7)), ("belady", (43.7, 77.2, 95.1)),
        ("belady-bypass", (60.8, 80.9, 95.6)),
    ):  # fmt: skip
        assert [by[policy, slots] for slots in (4, 8, 16)] == pytest.approx(figures, abs=1)
