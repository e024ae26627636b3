"""The examples run as a user runs them, and print what they promise."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import DATA, ROOT

TRACE = str(DATA / "small_trace.npz")
EXAMPLES = {
    "python_api.py": ([], ("Paris", "hit rate", "roof")),
    "own_policy.py": ([TRACE], ("lru", "Patient", "Paris", "in the engine: hit rate")),
    "replay_trace.py": ([TRACE], ("4 MoE layers", "lru", "belady")),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str) -> None:
    arguments, expected = EXAMPLES[name]
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout
