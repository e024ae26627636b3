"""Policies and predictors out of a person's own file: the documented ones run, and what goes wrong is one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import formula_policies
import numpy as np
import pytest
import torch
from exhaustive import cases
from paths import PROGRAMS, ROOT
from policy_contract import OnlineContract
from synthetic_traces import of, synthetic

from offmoe.cache.ahead import foresee
from offmoe.cache.plugin import PluginError
from offmoe.cache.policies.base import Policy
from offmoe.cache.policy import make_policy, parse_policy, policy_for
from offmoe.cache.predictor import make_predictor
from offmoe.cache.replay import replay
from offmoe.cache.residency import Residency
from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.plan import pick_policy

PAGE = (ROOT / "docs/policies.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HEAD = "import numpy as np\nfrom offmoe.cache.policies.base import Parameter, Policy\n"
BASE = """class Mine(Policy):
    def touch(self, records, now, uses=1):
        pass
    def score(self, records, now):
"""
AHEAD = (
    "from offmoe.cache.predictors.base import Predictor\nclass Mine(Predictor):\n    def predict(self, token, layer):\n"
)


def written(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def example(folder: Path, name: str) -> str:
    """The documented code block that has this class."""
    (block,) = (text for text in EXAMPLES if f"class {name}" in text)
    return f"{written(folder, block)}:{name}"


def test_the_documented_policy_is_twenty_lines_and_keeps_the_contract(tmp_path: Path) -> None:
    plugin = example(tmp_path, "MyPolicy")
    assert len((tmp_path / "mine.py").read_text().splitlines()) <= 20

    class Documented(OnlineContract):
        spec = f"{plugin},h=8"

    for name in dir(Documented):
        if name.startswith("test_"):
            getattr(Documented(), name)()


def test_the_documented_policy_by_hand(tmp_path: Path) -> None:
    policy = make_policy(example(tmp_path, "MyPolicy") + ",h=4", 3)
    policy.touch(np.array([0]), 0)
    policy.touch(np.array([0, 1]), 4, np.array([1, 4]))
    assert policy.score(np.arange(3), 4).tolist() == [1.5, 2, 0]
    assert policy.score(np.arange(3), 8).tolist() == [0.75, 1, 0]
    assert policy.score(np.arange(3), 8).dtype == np.float32


def test_the_spec_of_a_plugin_is_canonical_and_stands_for_itself(tmp_path: Path) -> None:
    plugin = example(tmp_path, "MyPolicy")
    assert make_policy(plugin, 4).name == f"{plugin},h=16"
    assert make_policy(make_policy(plugin, 4).name, 4).name == f"{plugin},h=16"


@pytest.mark.parametrize(
    ("name", "capability"),
    cases([("MyPolicy", 80), ("MyPolicy", 90), ("Signed", 80), ("Signed", 90)], [("MyPolicy", 80), ("Signed", 90)]),
)
def test_a_formula_compiles_into_the_kernels_and_rounds_to_nearest(tmp_path: Path, name: str, capability: int) -> None:
    """In a process of its own, for in this one Triton may be its interpreter."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    script = str(PROGRAMS / "compile_formula.py")
    plugin = f"{formula_policies.HERE}:{name}" if name == "Signed" else example(tmp_path, name)
    command = [sys.executable, "-P", script, str(capability), plugin]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert not [line for line in made.values() if "error" in line]
    assert made.keys() == {"_evaluate", "_candidates", "_route", "_predict"}
    assert "sqrt.rn.f32" in made["_evaluate"]["ptx"]
    assert "div.rn.f32" in made["_route"]["ptx"]  # there one use is a constant, and so is its root
    for kernel in ("_evaluate", "_candidates"):
        ptx = made[kernel]["ptx"]
        assert "div.rn.f32" in ptx
        assert not re.findall(r"(?:div\.(?:full|approx)|[^r]sqrt\.approx|fma|\w+\.\w+\.ftz)[.\w]*", ptx)


def test_a_formula_that_does_more_than_its_expressions_stays_off_the_gpu() -> None:
    """What a captured graph needs; and what says that it has none of it."""
    assert make_policy(f"{formula_policies.HERE}:Signed", 4).state == ("value", "last")
    assert make_policy(f"{formula_policies.HERE}:Touching", 4).state == ()
    with pytest.raises(OffmoeError, match="Touching' works on the CPU and in replay: on a GPU choose lru"):
        pick_policy(parse_policy(f"{formula_policies.HERE}:Touching"), torch.device("cuda"))


def test_a_formula_scores_in_float32() -> None:
    """A literal must not make it float64, which a kernel has not."""
    policy = make_policy(f"{formula_policies.HERE}:Signed", 4)
    policy.touch(np.array([0, 2]), 5, np.array([1, 3]))
    assert policy.score(np.arange(4), 7).dtype == np.float32
    assert (policy.score(np.arange(4), 7) < 0).all()


def test_an_engine_on_the_cpu_takes_a_plugin_and_says_the_same_tokens(tmp_path: Path) -> None:
    plugin = example(tmp_path, "MyPolicy")
    answers = []
    for policy in (plugin, "lru"):
        with Engine.load(str(DEMO), device="cpu", policy=policy, vram="50%", ctx=64) as engine:
            answers.append([piece.token for piece in engine.generate("Hello", temperature=0.0, max_tokens=4)])
            assert str(engine.plan.policy) == (f"{plugin},h=16" if policy == plugin else "lru")
            assert engine.store.table.policy.touch.__qualname__ == "Guard.touch" or policy == "lru"
    assert answers[0] == answers[1]


def test_the_documented_predictor_runs(tmp_path: Path) -> None:
    plugin = example(tmp_path, "MyPredictor")
    trace = synthetic(60, 3, 12, 3, seed=3)
    outcome = foresee(trace, "lru", 6, prefetch=f"{plugin},n=2")
    assert outcome.prefetch == f"{plugin},d=1,p=0.05,n=2"
    assert outcome.fetched > 20
    assert foresee(trace, "lru", 6, prefetch=f"{plugin},p=0.6").fetched == 0
    assert foresee(trace, "lru", 6, prefetch=f"shuffled:{plugin},n=2").fetched > 20


def test_a_plugin_may_let_misses_by_in_replay_only(tmp_path: Path) -> None:
    path = written(tmp_path, HEAD + BASE.replace("def touch", "bypass = True\n    def touch", 1) +
                   "        return np.where(records == 1, 1.0, -np.inf)\n")  # fmt: skip
    outcome = replay(of([[0], [1], [0], [1]], 2), f"{path}:Mine", 1)
    assert outcome.hit.ravel().tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="runs in replay only"):
        make_policy(f"{path}:Mine", 2)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path, HEAD + BASE + "        return records * 0\n")
    one = make_policy(f"{path}:Mine", 2).score(np.arange(2), 0)
    written(tmp_path, HEAD + BASE + "        return records * 0 + 100\n")
    os.utime(path, ns=(1, 1))
    other = make_policy(f"{path}:Mine", 2).score(np.arange(2), 0)
    assert (one.tolist(), other.tolist()) == ([0, 0], [100, 100])


def policy_error(folder: Path, text: str, spec: str = ":Mine") -> str:
    path = written(folder, HEAD + text)
    with pytest.raises(ValueError) as caught:
        replay(synthetic(20, 2, 8, 2), path + spec, 3)
    return one_line(caught.value).replace(path, "mine.py")


def one_line(error: BaseException) -> str:
    assert isinstance(error, ValueError)
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("text", "spec", "words"),
    [
        (BASE + "        return 1 / 0\n", ":Mine", "plug-in mine.py:Mine: score() raised ZeroDivisionError: division"),
        (BASE + "        raise OSError('a\\nb')\n", ":Mine", "score() raised OSError: a"),
        (BASE + "        raise KeyError\n", ":Mine", "score() raised KeyError: no message"),
        (BASE + "        return records * np.nan\n", ":Mine", "score() gave nan for record"),
        (BASE + "        return records + np.inf\n", ":Mine", "score() gave inf for record"),
        (
            BASE + "        records[:] = 0\n        return records\n",
            ":Mine",
            "score() raised ValueError: assign",
        ),
        (BASE.replace("pass", "records.sort()") + "        return records\n", ":Mine", "touch() raised ValueError"),
        (BASE + "        import sys\n        sys.exit(0)\n", ":Mine", "score() raised SystemExit: 0"),
        (BASE + "        raise GeneratorExit\n", ":Mine", "score() raised GeneratorExit: no message"),
        (BASE + "        raise OSError('\\n')\n", ":Mine", "score() raised OSError: "),
        ("import sys\nsys.exit()\n", ":Mine", "raised SystemExit: no message"),
        (
            BASE + "        return records\n    def attach(self, table):\n        1 / 0\n",
            ":Mine",
            "attach() raised Z",
        ),
        (BASE + "        return records\n    parameters = 3\n", ":Mine", "Mine.parameters is no dict of Parameter"),
        (BASE + "        return records\n    parameters = {'h': 3}\n", ":Mine", "Mine.parameters is no dict of Parame"),
        (BASE + "        return np.zeros(len(records) + 1)\n", ":Mine", "score() gave float64 ["),
        (BASE + "        return 0.0\n", ":Mine", "score() gave float64 []: expected a number for each of"),
        (BASE + "        return records.astype(str)\n", ":Mine", "expected a number for each of"),
        (BASE.replace("pass", "raise RuntimeError('no')") + "        return records\n", ":Mine", "touch() raised Runt"),
        (BASE + "        return records\n", ":Mine,h=3", "has no parameter 'h': write mine.py:Mine"),
        (BASE + "        return records\n", ":Yours", "plug-in mine.py has no class Yours that is a Policy"),
        (BASE + "        return records\n", "", "'mine.py' is no plug-in: write ./mine.py:PolicyClass"),
        (BASE + "        return records\n", ":Policy", "Policy lacks score, touch"),
        ("class Mine(Policy):\n    def score(self, r, n):\n        return r\n", ":Mine", "Mine lacks touch"),
        ("class Mine:\n    pass\n", ":Mine", "no class Mine that is a Policy"),
        ("this is no Python\n", ":Mine", "raised SyntaxError: invalid syntax"),
        ("import nowhere_to_be_found\n", ":Mine", "raised ModuleNotFoundError: No module named"),
        (
            BASE + "        return records\n    def __init__(self, records, name):\n        1 / 0\n",
            ":Mine",
            "raised ZeroD",
        ),
    ],
)
def test_a_broken_policy_is_one_line(tmp_path: Path, text: str, spec: str, words: str) -> None:
    assert words in policy_error(tmp_path, text, spec)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for make in (lambda spec: make_policy(spec, 4), lambda spec: make_predictor(spec, synthetic(4, 2, 8, 2))):
        with pytest.raises(PluginError, match=r"nowhere\.py: No such file or directory"):
            make(f"{tmp_path}/nowhere.py:Mine")


def test_a_score_of_what_nobody_owns_may_be_anything(tmp_path: Path) -> None:
    path = written(tmp_path, HEAD + BASE + "        return np.where(records < 0, np.nan, 1.0)\n")
    assert replay(synthetic(20, 2, 8, 2), f"{path}:Mine", 3).hits > 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("1 / 0", "predict() raised ZeroDivisionError"),
        ("[1, 2], [0.5]", "predict() for layer 1 of token 0 gave experts [2] and confidences [1]"),
        ("[1.5], [1]", "gave experts of float64: expected whole numbers"),
        ("[1, 1], [1, 1]", "gave an expert twice, or one that is not of 0 to 7"),
        ("[8], [1]", "gave an expert twice, or one that is not of 0 to 7"),
        ("[1], [float('nan')]", "gave nan: expected confidences"),
        ("[1], [float('inf')]", "gave inf: expected confidences"),
        ("__import__('sys').exit(0)", "predict() raised SystemExit: 0"),
        ("None", "predict() raised TypeError"),
    ],
)
def test_a_broken_predictor_is_one_line(tmp_path: Path, answer: str, words: str) -> None:
    path = written(tmp_path, AHEAD + f"        return {answer}\n")
    with pytest.raises(PluginError) as caught:
        foresee(synthetic(20, 2, 8, 2), "lru", 4, prefetch=f"{path}:Mine")
    assert words in one_line(caught.value)


def test_a_score_that_is_the_policys_own_array_is_not_written_to(tmp_path: Path) -> None:
    """The table marks slots that may not be evicted in the scores that it was given."""
    path = written(tmp_path, HEAD + BASE.replace("    def touch", """    def __init__(self, records, name):
        super().__init__(records, name)
        self.own = np.zeros(64)
    def touch""") + "        assert (self.own == 0).all()\n        return self.own[: len(records)]\n")  # fmt: skip
    assert replay(synthetic(50, 2, 8, 2), f"{path}:Mine", 3).hits > 0


def test_what_a_predictor_is_told_cannot_be_written_to(tmp_path: Path) -> None:
    text = AHEAD + "        return [1], [1.0]\n    def seen(self, token, layer, experts):\n        experts[0] = 0\n"
    with pytest.raises(PluginError, match=r"seen\(\) raised ValueError: assignment destination is read-only"):
        foresee(synthetic(20, 2, 8, 2), "lru", 4, prefetch=f"{written(tmp_path, text)}:Mine")


def test_an_engine_refuses_a_broken_plugin_at_the_start(tmp_path: Path) -> None:
    path = written(tmp_path, "1 / 0\n")
    with pytest.raises(OffmoeError, match="raised ZeroDivisionError"):
        Engine.load(str(DEMO), device="cpu", policy=f"{path}:Mine")


def test_a_plugin_knows_its_table_and_its_trace(tmp_path: Path) -> None:
    path = written(tmp_path, HEAD + "class Mine(Policy):\n    def attach(self, table):\n        self.table = table\n"
                   "    @classmethod\n    def for_trace(cls, trace, name):\n        made = cls(trace.records, name)\n"
                   "        made.trace = trace\n        return made\n"
                   "    def touch(self, records, now, uses=1):\n        pass\n"
                   "    def score(self, records, now):\n        return records\n")  # fmt: skip
    trace = synthetic(5, 2, 8, 2)
    policy: Any = policy_for(trace, f"{path}:Mine")
    table = Residency(2, 8, 6, policy)
    assert policy.table is table
    assert policy.trace is trace
    assert isinstance(policy, Policy)
