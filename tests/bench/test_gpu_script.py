"""bench/gpu.sh passes valid options, checked without a GPU: a stub of python3 records its arguments."""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

STUB = """#!/bin/sh
{ printf '%s\\t' "$@"; echo; } >>"$CALLS"
"""
Run = Callable[..., tuple[subprocess.CompletedProcess[str], list[list[str]]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "gpt-oss-20b.npz").touch()

    def script(*stages: str, traces: str = "traces") -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "CALLS": str(calls), "TMPDIR": str(tmp_path),
               "OFFMOE_TRACES": str(tmp_path / traces), "HOME": str(tmp_path)}  # fmt: skip
        done = subprocess.run(
            ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "out"), *stages],
            env=env, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        made = [line.split("\t")[:-1] for line in calls.read_text().splitlines()]
        return done, [call for call in made if call[:2] != ["-m", "pip"]]

    return script


def test_tests_run_side_by_side(run: Run) -> None:
    done, (asked, call) = run("tests")
    assert done.returncode == 0, done.stderr
    assert asked[-1] == "import xdist"
    assert call[:4] == ["-P", "-m", "pytest", "tests/gpu"]
    assert call[-2:] == ["-n", str(len(os.sched_getaffinity(0)) * 2 // 3)]


@pytest.mark.parametrize(
    "stage",
    ["kernels", "decode", "decode-long", "decode-gpt-oss", "decode-prefetch", "misses", "quick", "prefill", "memory",
     "families"],
)  # fmt: skip
def test_benchmarks_take_what_they_are_given(run: Run, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done, calls = run(stage)
    assert done.returncode == 0, done.stderr
    assert calls
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for file, *arguments in calls:
        assert (ROOT / file).is_file()
        if Path(file).stem in ("decode", "misses", "prefill"):
            importlib.import_module(Path(file).stem).parse_args(arguments)


def test_without_the_trace_what_needs_it_fails(run: Run) -> None:
    done, calls = run("tests", traces="nowhere")
    assert (done.returncode, calls) == (1, [])
    assert "gpt-oss-20b.npz is absent: carry .traces, or set OFFMOE_TRACES" in done.stderr
    done, calls = run("quick", traces="nowhere")
    assert (done.returncode, len(calls)) == (0, 1)


def test_an_unknown_stage_is_named(run: Run) -> None:
    done, _ = run("decod")
    assert done.returncode == 2
    assert "stage decod is unknown" in done.stderr
