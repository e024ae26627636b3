"""Live measurements: replay and engine have the same misses, interrupted runs resume, and invalid input is reported."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exhaustive import cases
from tiny_models import saved

from offmoe.app.cli import main
from offmoe.cache import files
from offmoe.cache.policies import POLICIES
from offmoe.checkpoint.find_model import DEMO
from offmoe.decode.eager import EagerDecoder
from offmoe.decode.prefetch_guard import Guard
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.lab.live import run as live_run
from offmoe.lab.live.folder import Cell, Folder, write_file
from offmoe.lab.live.measure import Bench
from offmoe.lab.live.probe import ObservedAnswer, Probe
from offmoe.lab.live.prompts import PROMPTS, encode_prompt, load_prompts
from offmoe.lab.live.results import Configuration, Measured
from offmoe.lab.live.sweep import POLICIES as SWEPT
from offmoe.lab.live.sweep import Sweep, join_traces, run_sweep
from offmoe.lab.live.truth import Answer, Simulator, answers_of, same_events
from offmoe.lab.trace.prompts import Prompt
from offmoe.models.model import open_model
from offmoe.plan import DEFAULT_POLICY
from offmoe.settings import Settings

BUDGETS = ("37.5%", "50%", "75%")  # 3, 4 and 6 slots a layer for top-3 of 8
IDS = [[(seed * 17 + at * at * 7) % 90 + 3 for at in range(40)] for seed in range(3)]  # prompts of 3 chunks
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen3_moe", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def earlier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trace of the model, for policies that need one."""
    path = tmp_path_factory.mktemp("earlier") / "trace.npz"
    with Engine(open_model(model), Settings.of(device="cpu", ctx=128)) as engine, Probe(engine) as probe:
        probe.run(IDS[0], 8)
        probe.recorder.trace().save(path)
    return path


def live(model: Path, **settings: Any) -> tuple[list[ObservedAnswer], Engine]:
    chosen = {"device": "cpu", "ctx": 128, "chunk": 16, **settings}
    with Engine(open_model(model), Settings.of(**chosen)) as engine, Probe(engine) as probe:
        return [probe.run(ids, 24) for ids in IDS], engine


def replayed(answers: list[ObservedAnswer], engine: Engine) -> list[Any]:
    simulator = Simulator(engine.plan, engine.config.layers, engine.config.experts)
    return [simulator.answer(answer) for answer in answers]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("vram", BUDGETS)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_replay_misses_what_the_engine_misses(
    model: Path, earlier: Path, policy: str, vram: str, scope: str
) -> None:
    """The same experts in the same order, with prompts in chunks and waves before every answer."""
    spec = f"{policy}:profile={earlier}" if "profile" in POLICIES[policy].parameters else policy
    answers, engine = live(model, vram=vram, policy=spec, scope=scope)
    for answer, simulated in zip(answers, replayed(answers, engine), strict=True):
        assert len(answer.steps) == 24
        assert [len(chunk) for chunk in answer.prompt] == [16, 16, 8]
        assert same_events(answer.missed, simulated.missed)
        assert np.array_equal(answer.hits, simulated.hits)
    missed = sum(len(event) for answer in answers for event in answer.missed)
    assert 0 < missed < len(IDS) * 24 * 9, "hits and misses, or nothing is compared"


def test_a_replay_without_the_prompt_is_caught(model: Path) -> None:
    """The test above can fail."""
    answers, engine = live(model, vram="50%")
    for answer in answers:
        answer.prompt = []
    assert not all(same_events(a.missed, s.missed) for a, s in zip(answers, replayed(answers, engine), strict=True))


def test_a_recorded_trace_is_replayed_as_it_was_run(model: Path) -> None:
    """Restore the chunks from a file that has only tokens."""
    with Engine(open_model(model), Settings.of(device="cpu", ctx=128, chunk=16)) as engine, Probe(engine) as probe:
        answers = [probe.run(ids, 8) for ids in IDS]
        trace = probe.recorder.trace()
    for again, answer in zip(answers_of(trace, engine.plan.chunk), answers, strict=True):
        assert same_events(again.prompt, answer.prompt)
        assert same_events(again.steps, answer.steps)


def test_everything_in_slots_never_misses(model: Path) -> None:
    answers, engine = live(model, vram="100%")
    for answer, simulated in zip(answers, replayed(answers, engine), strict=True):
        assert answer.hits.tolist() == simulated.hits.tolist() == [24 * 3] * 3


def test_the_demo_is_replayed_exactly() -> None:
    with Bench(DEMO, Settings.of(device="cpu"), list(PROMPTS), 30) as bench:
        measured, trace = bench.measure(bench.canonical("50%", None, None), bench.prompts[:2], 10)
    assert measured.tokens == len(trace.experts) == 10
    assert measured.prompts == trace.sequences == 2
    assert measured.same_misses is True
    assert measured.simulated == pytest.approx(measured.hit_rate, abs=1e-9)
    assert np.mean(measured.hits_by_layer) == pytest.approx(measured.hit_rate)
    assert measured.uploads == pytest.approx(measured.misses) == pytest.approx(300 * (1 - measured.hit_rate))
    assert sum(measured.parts.values()) == pytest.approx(measured.ms)
    assert all(value > 0 for value in measured.parts.values())
    assert measured.parts["page-in"] == pytest.approx(measured.stall_ms)


@pytest.mark.parametrize(
    "policy",
    cases([name for name, kind in POLICIES.items() if "profile" not in kind.parameters], ["lru", "echo"]),
)
def test_the_demo_misses_what_its_replay_misses(policy: str) -> None:
    """The same experts in the same order, at three budgets."""
    with Bench(DEMO, Settings.of(device="cpu"), list(PROMPTS), 30) as bench:
        for vram in ("31.3%", "50%", "75%"):
            measured, _ = bench.measure(bench.canonical(vram, policy, None), bench.prompts[:1], 6)
            assert measured.misses > 0, vram
            assert measured.same_misses is True, vram


def test_a_probe_leaves_nothing_behind(model: Path) -> None:
    with Engine(open_model(model), Settings.of(device="cpu", ctx=128)) as engine:
        before = [dict(vars(part)) for part in (engine.trunk, engine.store, engine.store.table)]
        with pytest.raises(KeyboardInterrupt), Probe(engine):
            raise KeyboardInterrupt
        after = [vars(part) for part in (engine.trunk, engine.store, engine.store.table)]
        assert [part.keys() for part in after] == [part.keys() for part in before]
        assert engine.store.routed is None


def test_prefetching_is_measured_without_the_chats_guard(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard would turn prefetching off for half of so short a run."""
    monkeypatch.setattr(EagerDecoder, "guard", Guard(), raising=False)
    with bench.engine(bench.canonical("50%", None, None)) as engine:
        guard: Any = engine.decoder.guard  # type: ignore[union-attr]
        assert all(guard.use() for _ in range(40))
    chats = Guard()
    assert not all(chats.use() for _ in range(40))


# The order of a sweep.


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(DEMO, Settings.of(device="cpu"), list(PROMPTS), 10) as bench:
        yield bench


def test_rounds_interleave_and_a_budget_ends_with_its_baseline(bench: Bench) -> None:
    sweep = Sweep.of(bench, ("50%", "75%"), ("lru", "lfu", "lfru"), (), 2)
    turns = [(c.round, str(c.configuration), c.again) for c in sweep.cells()]
    a_round = [
        [("50% lru", False), ("50% lfu", False), ("50% lfru", False), ("50% lru", True)],
        [("75% lru", False), ("75% lfu", False), ("75% lfru", False), ("75% lru", True)],
    ]
    assert [turn[1:] for turn in turns if turn[0] == 0] == a_round[0] + a_round[1]
    second = [turn[1:] for turn in turns if turn[0] == 1]
    assert [name for name, _ in second] == ["75% lru", "75% lfru", "75% lfu", "75% lru", "50% lru", "50% lfru",
                                            "50% lfu", "50% lru"]  # fmt: skip
    assert Counter(turn[1:] for turn in turns) == Counter(a_round[0] * 2 + a_round[1] * 2)
    assert len({cell.file for cell in sweep.cells()}) == 16


def test_the_default_is_four_budgets_from_the_smallest_that_works(bench: Bench) -> None:
    sweep = Sweep.of(bench, (), (), (), 5)
    assert list(sweep.budgets) == ["31.3%", "50%", "75%", "100%"]
    assert [c.policy for c in sweep.budgets["50%"]] == [bench.canonical("50%", p, None).policy for p in SWEPT]
    assert len(SWEPT) == 3
    assert SWEPT[0] == str(DEFAULT_POLICY)
    assert len(sweep.budgets["100%"]) == 1, "nothing is evicted: one is enough"
    assert len(sweep.notes) == 2


def test_one_policy_under_two_names_is_measured_once(bench: Bench) -> None:
    assert len(Sweep.of(bench, ("50%", "50.0%"), ("crf:h=64", "crf"), (), 1).configurations) == 1


# Folders.

MEASURED = Measured(
    vram="50%", policy="lru", prefetch="none", slots=8, tokens=10, prompts=1, seconds=0.1, routed=6, hit_rate=0.5,
    covered=0.0, late=0.0, misses=3.0, uploads=3.0, stall_ms=1.0, parts={"experts": 10.0}, hits_by_layer=[0.5],
    simulated=0.5, same_misses=True, roof_ms=5.0, roof="floor", token_bytes=1e6, prompt_tok_s=100.0,
)  # fmt: skip
CELL = Cell(0, 0, Configuration("50%", "lru"))


def test_a_measurement_comes_back_as_it_was(tmp_path: Path) -> None:
    Folder(tmp_path / "run", {"tokens": 5}).write(CELL, MEASURED)
    again = Folder(tmp_path / "run", {"tokens": 5})
    assert again.read(CELL) == MEASURED
    assert again.read(Cell(1, 0, Configuration("50%", "lru"), again=True)) is None
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == ["000-r0-50pct-lru.json", "cells", "run.json"]


@pytest.mark.parametrize("content", ["", '{"run": "', "[]", "null", '{"run": "another"}', "\xff\xfe"])
def test_a_damaged_measurement_is_made_again(tmp_path: Path, content: str) -> None:
    folder = Folder(tmp_path, {})
    folder.write(CELL, MEASURED)
    path = tmp_path / "cells" / CELL.file
    path.write_bytes(content.encode("latin1"))
    assert folder.read(CELL) is None
    assert folder.broken == [path]


def test_a_truncated_measurement_is_made_again(tmp_path: Path) -> None:
    folder = Folder(tmp_path, {})
    folder.write(CELL, MEASURED)
    path = tmp_path / "cells" / CELL.file
    path.write_bytes(path.read_bytes()[:-30])
    assert folder.read(CELL) is None


@pytest.mark.exhaustive
def test_an_interrupted_run_goes_on(tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, measure, measured = Sweep.of(bench, ("50%",), ("lru", "lfu"), (), 2), bench.measure, list[str]()

    def until_ctrl_c(configuration: Configuration, *rest: Any) -> Any:
        measured.append(str(configuration))
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(configuration, *rest)

    monkeypatch.setattr(bench, "measure", until_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(bench, sweep, Folder(tmp_path, {}), 6, lambda *_: None)
    seen: list[tuple[int, int]] = []
    folder = Folder(tmp_path, {})
    results = run_sweep(bench, sweep, folder, 6, lambda _, *turn: seen.append(turn))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)], "three of six were kept"
    assert list(results) == sweep.cells()
    trace = join_traces(folder, 2)
    assert len(trace.experts) == sum(m.tokens for c, m in results.items() if str(c.configuration) == "50% lfu")
    assert trace.sequences >= 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:99])


@pytest.mark.parametrize("spoil", cases([Path.unlink, cut], [cut]))
def test_a_round_whose_trace_is_lost_is_measured_again(
    tmp_path: Path, bench: Bench, spoil: Callable[[Path], object]
) -> None:
    """One measurement is enough: all have the same routing."""
    sweep, folder = Sweep.of(bench, ("50%",), ("lru",), (), 2), Folder(tmp_path, {})
    run_sweep(bench, sweep, folder, 4, lambda *_: None)
    spoil(tmp_path / "trace-1.npz")
    seen: list[int] = []
    run_sweep(bench, sweep, folder, 4, lambda what, done, todo: seen.append(todo))
    assert seen == [1, 1]
    assert join_traces(folder, 2).sequences == 2


def test_a_full_disk_is_one_line_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    folder = Folder(tmp_path, {})
    folder.write(CELL, MEASURED)
    monkeypatch.setattr(files, "open", lambda *_: Full(), raising=False)
    with pytest.raises(OffmoeError, match=r"cannot write .*: No space left on device; files written before are kept"):
        folder.write(Cell(1, 0, Configuration("75%", "lru")), MEASURED)
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [CELL.file]


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b.txt", "one")
    write_file(tmp_path / "a" / "b.txt", b"two")
    assert [(path.name, path.read_text()) for path in (tmp_path / "a").iterdir()] == [("b.txt", "two")]


# The command.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `offmoe bench latency` in this process; an error that would print a traceback fails the test."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["offmoe", "bench", "latency", *map(str, arguments)])
        capfd.readouterr()
        status = main()
        return status, *capfd.readouterr()

    return call


def refused(result: tuple[int, str, str], status: int = 1) -> str:
    found, out, err = result
    assert (found, out) == (status, ""), err
    assert err.startswith("offmoe: ")
    assert err.index("\n") == len(err) - 1
    return err.removeprefix("offmoe: ").rstrip("\n")


SMALL = ("--device", "cpu", "--vram", "50%", "--policy", "lru", "--policy", "lfu", "--tokens", 6, "--rounds", 2)


def test_the_command_measures_reports_and_resumes(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "results"
    status, screen, err = command("demo", *SMALL, "-o", out)
    assert status == 0, err
    assert "noise" in screen or "faster" in screen or "slower" in screen
    files = {"run.json", "latency.csv", "report.md", "latency.png", "stack.png", "layers.png", "misses.png"}
    assert files <= {path.name for path in out.iterdir()}
    assert len(list((out / "cells").iterdir())) == 6
    assert len((out / "latency.csv").read_text().splitlines()) == 7
    stamps = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    (out / "cells" / sorted(path.name for path in stamps)[2]).write_text('{"run')
    status, _, err = command("demo", *SMALL, "-o", out)
    assert status == 0
    assert "was damaged and is measured again" in err
    changed = [path for path in stamps if path.stat().st_mtime_ns != stamps[path]]
    assert len(changed) == 1, "only the damaged one was measured again"
    line = refused(command("demo", *SMALL[:-1], 1, "-o", out))
    assert "has the results of another run" in line


@pytest.mark.exhaustive
def test_a_replay_that_is_off_ends_with_3(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a simulator that ignores the prompts."""
    answer = Simulator.answer
    monkeypatch.setattr(Simulator, "answer", lambda self, a: answer(self, Answer([], a.steps)))
    status, screen, _ = command("demo", *SMALL, "-o", tmp_path / "results")
    assert status == 3
    assert "the replay disagrees: 50% lru: measured" in screen
    report = (tmp_path / "results" / "report.md").read_text()
    assert "**50% lru: measured" in report
    assert "**No result of a replay can be trusted here" in report
    assert "**Other experts missed, or in another order, in 2 of 2 configurations.**" in report


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--policy", "fifo"], "policy 'fifo' is unknown"),
        (["--policy", "belady"], "policy 'belady'"),
        (["--vram", "10%"], "the smallest that works is"),
        (["--vram", "lots"], "'lots' is not a size"),
        (["--prefetch", "gate"], "works on a GPU, and the device is the CPU"),
        (["--prefetch", "oracle"], "prefetch 'oracle' is unknown"),
        (["--tokens", "100000"], "the context holds 8192: give shorter prompts or fewer --tokens"),
        (["--rounds", "17"], "17 rounds need at least as many prompts, and there are 16"),
        (["--prompts", "/nowhere/prompts.txt"], "cannot read /nowhere/prompts.txt: No such file or directory"),
    ],
)
def test_what_cannot_be_measured_is_refused_before(
    command: Command, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    assert expected in refused(command("demo", "--device", "cpu", *arguments, "-o", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: (folder / "other.txt").write_text("mine"), "is not empty and has no run"),
        (lambda folder: (folder / "run.json").write_text("{"), "run.json is damaged"),
        (lambda folder: (folder / "run.json").write_text('{"key": "another"}'), "has the results of another run"),
    ],
)
def test_a_folder_that_is_no_run_of_ours_is_left_alone(
    command: Command, tmp_path: Path, make: Callable[[Path], object], expected: str
) -> None:
    make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert expected in refused(command("demo", *SMALL, "-o", tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot" in refused(command("demo", *SMALL, "-o", tmp_path / "file"))
    assert "cannot" in refused(command("demo", *SMALL, "-o", tmp_path / "file" / "out"))
    assert "cannot write /proc/out" in refused(command("demo", *SMALL, "-o", "/proc/out"))


def test_a_model_without_a_tokenizer_is_refused(command: Command, model: Path, tmp_path: Path) -> None:
    assert "tokenizer" in refused(command(model, *SMALL, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_nothing_is_measured(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_run, "find_spec", lambda _: None)
    assert "pip install 'offmoe[lab]'" in refused(command("demo", *SMALL, "-o", tmp_path / "out"))


def test_prompts_are_those_of_trace_record(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \nthree\nfour\nfive\none\n")
    assert [prompt.given for prompt in load_prompts(file)] == ["one", "two", "three", "four", "five"]
    file.write_text("one\none\none\none\none\n")
    with pytest.raises(OffmoeError, match="has 1 different prompts: at least 5 are needed"):
        load_prompts(file)
    file.write_bytes(b"\xff")
    with pytest.raises(OffmoeError, match=r"is not UTF-8"):
        load_prompts(file)
    assert len({prompt.given for prompt in PROMPTS}) == len(PROMPTS) >= 5


def test_prompts_go_through_the_template_unless_raw(bench: Bench) -> None:
    asked, raw = (encode_prompt(bench.tokenizer, Prompt("", "Hello!", raw=raw)) for raw in (False, True))
    messages = encode_prompt(bench.tokenizer, Prompt("", [{"role": "user", "content": "Hello!"}]))
    assert asked == messages
    assert len(raw) < len(asked)
    assert raw == bench.tokenizer.encode("Hello!")


def test_ctrl_c_says_what_is_kept(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "measure", measure)
    status, _, err = command("demo", *SMALL, "-o", tmp_path / "out")
    assert status == 130
    assert "offmoe: 0 of 6 measurements are saved: run the same command to continue" in err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["tokens"] == 6


def test_a_cell_names_itself() -> None:
    assert Cell(3, 1, Configuration("8589934592", "crf:h=16", "gate:d=1,p=0.05,n=2"), True).file == (
        "003-r1-8-GiB-crf-h16---gate-d1-p0.05-n2-again.json"
    )
