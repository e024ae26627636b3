"""`offmoe trace …`: files and output, Ctrl-C, and one-line errors."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from synthetic_traces import synthetic

from offmoe.app.cli import cli, explain
from offmoe.cache.trace import Trace
from offmoe.lab.trace.prompts import BUILT_IN, Prompt, read_prompts

ANSWER = {"--ctx": "512", "--device": "cpu", "--seed": "3"}


def trace(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["trace", *map(str, arguments)])


def error(*arguments: Any) -> str:
    """Return the line that the command line would print."""
    result = trace(*arguments)
    if result.exit_code == 2:
        return result.output
    assert isinstance(result.exception, Exception), "it went well"
    line = explain(result.exception)
    assert line is not None, f"a traceback: {result.exception!r}"
    assert "\n" not in line
    return line


def options(**more: str) -> list[str]:
    return [word for pair in {**ANSWER, **more}.items() for word in pair]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of 60 tokens of two prompts of the demo, with states."""
    folder = tmp_path_factory.mktemp("trace")
    prompts = [
        {"prompt": "Tell me a story about a fox.", "class": "story"},
        {"text": "1, 2, 3, 4,", "class": "numbers"},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    out = folder / "t.npz"
    result = trace("record", "--prompts", folder / "prompts.jsonl", "--tokens", 60, "--states", "-o", out, *options())
    assert result.exit_code == 0, result.exception
    assert result.output == f"{out}: 60 tokens of 2 answers\n"
    return out


def test_a_recording_holds_what_was_asked_for(recorded: Path) -> None:
    found = Trace.load(recorded)
    assert len(found.experts) == 60
    assert found.meta["model"] == "smolmoe-demo-Q4_0"
    assert found.meta["classes"] == ["story", "numbers"]
    assert found.meta["sampling"].endswith("seed 3")
    assert found.states is not None
    assert found.states.shape[:2] == (60, 30)
    assert found.prefill_tokens is not None
    pieces = found.meta["pieces"]
    prompt = "".join(pieces[str(token)] for token in found.prefill_tokens[: found.prompts[1]])
    assert "Tell me a story about a fox." in prompt
    assert "".join(pieces[str(token)] for token in found.prefill_tokens[found.prompts[1] :]) == "1, 2, 3, 4,"
    assert sorted(path.name for path in recorded.parent.iterdir()) == ["prompts.jsonl", "t.npz"]


def test_a_recording_can_be_repeated_without_the_weights(recorded: Path) -> None:
    again = recorded.with_name("again.npz")
    prompts = recorded.with_name("prompts.jsonl")
    assert trace("record", "--prompts", prompts, "--tokens", 60, "--ids-only", "-o", again, *options()).exit_code == 0
    bare = dict.fromkeys(("probs", "prefill_probs", "states", "logits", "gates"))
    assert Trace.load(again) == replace(Trace.load(recorded), **bare)
    again.unlink()


@pytest.mark.exhaustive
def test_short_answers_are_asked_for_again_until_there_is_enough(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("What is the capital of France? Answer in one word.\n\nHi!\n")
    out = tmp_path / "t.npz"
    common = "--prompts", tmp_path / "p.txt", "--tokens", 200
    assert trace("record", *common, "-o", out, *options()).exit_code == 0
    found = Trace.load(out)
    assert len(found.experts) == 200
    assert found.tokens is not None
    answers = [found.tokens[start:end].tolist() for start, end in itertools.pairwise(found.offsets)]
    assert len(answers) > 2
    assert answers[1] != answers[3], "another seed"
    lengths = np.diff(found.prompts)
    assert lengths[0] == lengths[2] > 10, "a prompt is run whole each time"
    greedy = trace("record", *common, "-o", out, "--force", "--temperature", 0, *options())
    assert greedy.exit_code == 0
    assert Trace.load(out).sequences <= 2, "greedy answers would be the same again"


def test_ctrl_c_keeps_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "t.npz"
    code = "import sys; from offmoe.app.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", code, "trace", "record", "--built-in", "--tokens", "4000", "-o", str(out)]
    poke = (
        "import offmoe.lab.trace.record as r; run = r.Recording.run\n"
        "def told(self, tokens, progress):\n"
        "    run(self, tokens, lambda done: print(done, flush=True) or progress(done))\n"
        "r.Recording.run = told\n"
    )
    command[3] = poke + code
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "30":
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 130, errors
    found = Trace.load(out)
    assert 30 <= len(found.experts) < 200
    assert f"{out}: {len(found.experts)} tokens of" in rest
    assert list(tmp_path.iterdir()) == [out]


def test_ctrl_c_before_the_first_token_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offmoe.lab.trace.record import Recording

    monkeypatch.setattr(Recording, "run", lambda self, *_: self.stop())
    out = tmp_path / "t.npz"
    assert "nothing was decoded" in error("record", "--built-in", "-o", out, *options())
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["record", "-o", "t.npz"], "Give either --prompts FILE or --built-in"),
        (["record", "--built-in", "--prompts", "x", "-o", "t.npz"], "Give either"),
        (["record", "--built-in"], "Missing option '-o'"),
        (["record", "--built-in", "-o", "t.csv"], "t.csv ends with '.csv': expected .npz"),
        (["record", "--built-in", "-o", "no/where/t.npz"], "no/where is not a directory"),
        (["record", "--built-in", "-o", "t.npz", "--tokens", "0"], "0 is not in the range"),
        (["record", "--prompts", "none.txt", "-o", "t.npz"], "cannot read none.txt: No such file"),
        (["record", "--prompts", "empty.txt", "-o", "t.npz"], "empty.txt has no prompt"),
        (["record", "--prompts", "latin.txt", "-o", "t.npz"], "latin.txt is not UTF-8: byte 0xe4 at offset 1"),
        (["record", "--prompts", "bad.jsonl", "-o", "t.npz"], "bad.jsonl, line 2 is not a prompt"),
        (["record", "--prompts", "long.txt", "-o", "t.npz", "--ctx", "16"], "prompt 'one two"),
        (["record", "./nowhere.gguf", "--built-in", "-o", "t.npz"], "give a .gguf file"),
        (
            ["record", "--built-in", "-o", "there.npz"],
            "there.npz exists: choose another name, or overwrite it with --force",
        ),
        (["info", "none.npz"], "none.npz is no routing trace: [Errno 2] No such file"),
        (["info", "cut.npz"], "cut.npz is no routing trace: "),
        (["info", "there.npz", "--plot", "no/where.png"], "no is not a directory: create it first"),
        (["fit", "there.npz", "-o", "map.npz"], "has no states: record it with --states"),
        (["convert", "there.npz", "there.txt"], "ends with '.txt': expected .npz or .csv or .jsonl"),
        (["convert", "latin.txt", "t.npz"], "latin.txt ends with '.txt'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    synthetic(20, 2, 8, 2).save("there.npz")
    Path("cut.npz").write_bytes(Path("there.npz").read_bytes()[:-40])
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"h\xe4\n")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    Path("long.txt").write_text("one two three " * 20)
    before = sorted(tmp_path.iterdir())
    assert words in error(*arguments)
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_the_prompts_that_come_with_it_are_varied() -> None:
    assert len({str(prompt.given) for prompt in BUILT_IN}) == len(BUILT_IN) >= 24
    assert len({prompt.kind for prompt in BUILT_IN}) >= 8
    assert any(prompt.raw for prompt in BUILT_IN)


def test_prompts_are_read_from_lines_and_objects(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\n\n two \n")
    assert read_prompts(tmp_path / "p.txt") == [Prompt("", "one"), Prompt("", "two")]
    messages = [{"role": "user", "content": "hi"}]
    rows: list[dict[str, Any]] = [{"prompt": "a", "class": "x"}, {"text": "b"}, {"messages": messages}]
    (tmp_path / "p.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("x", "a"), Prompt("", "b", True), Prompt("", messages)]


def test_info_says_the_same_in_a_table_and_in_json(recorded: Path) -> None:
    facts = json.loads(trace("info", recorded, "--json").output)
    table = trace("info", recorded).output
    assert facts["tokens"] == 60
    mean = float(np.mean(facts["load"]["hottest_quarter"]))
    assert f"{mean:.1%}" in table
    assert "numbers" in table
    assert set(facts["specialisation"]) == {"position", "token", "prompt"}


def test_info_draws_a_picture(recorded: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "t.png"
    assert trace("info", recorded, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000, "six panels"


def test_without_matplotlib_a_plot_is_one_line(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'offmoe[lab]'" in error("info", recorded, "--plot", tmp_path / "t.png")
    assert not list(tmp_path.iterdir())
