"""Tuning keeps only what is faster beyond the noise; chat and run use the profile."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_engine
import numpy as np
import pytest
from synthetic_traces import synthetic

from offmoe.app import cli
from offmoe.app.profile import Profile, apply_profile, model_key, profile_path, read_profile
from offmoe.cache.trace import Trace
from offmoe.checkpoint.find_model import DEMO
from offmoe.errors import OffmoeError
from offmoe.lab.live.folder import write_file
from offmoe.lab.live.measure import Bench
from offmoe.lab.live.results import Configuration
from offmoe.lab.trace.prompts import Prompt
from offmoe.lab.tune import halving as lab
from offmoe.lab.tune.halving import Tuner, Verdict, profile_text
from offmoe.settings import Settings, parse_budget, parse_policy, parse_prefetch

DEFAULT = Configuration("50%", "crf:h=16")


# What tuning decides.


class FakeBench:
    """A bench whose times come from a function; a visit takes one second of its own clock."""

    def __init__(self, ms: Callable[[Configuration, int], float], device: str = "cpu", whole: bool = False) -> None:
        self.ms, self.visits, self.clock = ms, list[Configuration](), 0.0
        self.base = Settings.of()
        self.prompts = [[1], [2]]
        self.device, self.whole = device, whole

    def plan_of(self, settings: Settings) -> Any:
        return FakePlan("crf:h=16", SimpleNamespace(type=self.device), self.whole)

    def canonical(self, vram: str, policy: str | None, prefetch: str | None) -> Configuration:
        if policy == "slru" and self.device == "cuda":
            raise OffmoeError("policy 'slru' works on the CPU and in replay")
        return Configuration(vram, policy or "crf:h=16", prefetch or "none")

    def measure(self, configuration: Configuration, prompts: object, quota: int) -> tuple[Any, Trace]:
        self.visits.append(configuration)
        self.clock += 1
        return SimpleNamespace(ms=self.ms(configuration, len(self.visits)), tokens=64), prompted()


class FakePlan:
    """A plan of 4 slots a layer for `synthetic`; a class, so that `replace` is not needed."""

    slots, scope, chunk, vram_bytes = 24, "layer", 8, 1000

    def __init__(self, policy: str, device: object, whole: bool) -> None:
        self.policy, self.device, self.all_in_slots = policy, device, whole


def prompted() -> Trace:
    return replace(synthetic(60, 3, 16, 4), prefill=synthetic(20, 3, 16, 4, seed=1).experts)


def tuned(monkeypatch: pytest.MonkeyPatch, bench: FakeBench, minutes: float = 5) -> tuple[Verdict, FakeBench]:
    monkeypatch.setattr(lab.time, "perf_counter", lambda: bench.clock)
    monkeypatch.setattr(lab, "replace", replaced)
    monkeypatch.setattr(lab, "MAX_POLICIES", 99)
    monkeypatch.setattr(lab, "MISS_RATIO", 2.0)  # the synthetic trace shall not choose
    return Tuner(bench, "50%", minutes, lambda *_: None).run(), bench  # type: ignore[arg-type]


def replaced(value: Any, **changes: Any) -> Any:
    return FakePlan(changes["policy"], value.device, value.all_in_slots) if isinstance(value, FakePlan) else replace(
        value, **changes
    )  # fmt: skip


def shaken(visit: int, size: float) -> float:
    """Return deterministic noise of a few percent."""
    return 1 + size * float(np.sin(visit * 12.9898))


def test_what_is_faster_beyond_the_noise_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, _ = tuned(monkeypatch, FakeBench(lambda c, n: (8 if c.policy == "lfru" else 10) * shaken(n, 0.02)))
    assert verdict.chosen == replace(DEFAULT, policy="lfru")
    assert verdict.gain == pytest.approx(0.2, abs=0.03)
    assert 0 < verdict.spread < verdict.gain
    assert verdict.rounds >= 3


def test_the_default_stays_where_all_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (0.0, 0.05, 0.3):
        verdict, _ = tuned(monkeypatch, FakeBench(lambda _, n, size=size: 10 * shaken(n, size)))
        assert verdict.chosen is None
        assert "noise or slower" in verdict.why


def test_luck_in_the_rounds_that_choose_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that is fast among many and slow alone: only the final rounds decide."""
    lucky = "lru"

    def ms(configuration: Configuration, visit: int) -> float:
        return 5 if configuration.policy == lucky and visit < 25 else 10.5 if configuration.policy == lucky else 10

    verdict, bench = tuned(monkeypatch, FakeBench(ms))
    assert bench.visits[-2].policy == lucky
    assert verdict.chosen is None
    assert (verdict.gain, verdict.spread) == pytest.approx((-0.05, 0), abs=1e-9)


def test_every_round_is_framed_by_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    _, bench = tuned(monkeypatch, FakeBench(lambda *_: 10.0))
    visits = bench.visits[1:]  # the first records the trace
    assert visits[0] == visits[-1] == DEFAULT
    inner = [index for index, one in enumerate(visits) if one != DEFAULT]
    assert all(visits[index - 1] == DEFAULT or index - 1 in inner for index in inner)


@pytest.mark.parametrize("minutes", [0.5, 1, 2, 5])
def test_the_time_is_kept(monkeypatch: pytest.MonkeyPatch, minutes: float) -> None:
    _, bench = tuned(monkeypatch, FakeBench(lambda *_: 10.0), minutes)
    assert bench.clock <= 60 * minutes


def test_too_little_time_is_an_error_that_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OffmoeError, match=r"--minutes 0.1 is too short on this machine: give at least 0.4"):
        tuned(monkeypatch, FakeBench(lambda *_: 10.0), 0.1)


def test_nothing_is_tried_where_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, bench = tuned(monkeypatch, FakeBench(lambda *_: 10.0, whole=True))
    assert verdict.chosen is None
    assert "every expert has a slot" in verdict.why
    assert bench.visits == []


def test_prefetchers_are_tried_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = lab.GATES[1]
    fast = FakeBench(lambda c, _: 8 if c.prefetch == gate else 10, device="cuda")
    verdict, _ = tuned(monkeypatch, fast)
    assert verdict.chosen == replace(DEFAULT, prefetch=gate)
    _, bench = tuned(monkeypatch, FakeBench(lambda *_: 10.0))
    assert {one.prefetch for one in bench.visits} == {"none"}


def test_a_candidate_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def ms(configuration: Configuration, _: int) -> float:
        if configuration != DEFAULT:
            raise OffmoeError("it has no expression for the GPU")
        return 10

    verdict, _ = tuned(monkeypatch, FakeBench(ms))
    assert verdict.chosen is None
    assert "cannot run on this machine" in verdict.why


def test_the_demo_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real engine, in a run too short to prove anything."""
    monkeypatch.setattr(lab, "STEPS", 2)
    monkeypatch.setattr(lab, "TOKENS", 10)
    monkeypatch.setattr(lab, "POLICIES", ("lru",))
    monkeypatch.setattr(lab, "MISS_RATIO", 2.0)
    monkeypatch.setattr(lab, "FINAL_ROUNDS", (1, 1))
    verdict = lab.tune(
        DEMO, Settings.of(device="cpu"), "50%", [Prompt("", "Hello!"), Prompt("", "Good bye!")], 60, lambda *_: None
    )
    assert verdict.chosen is None, "one round proves nothing"
    assert [candidate.configuration.policy for candidate in verdict.candidates] == ["lru"]
    assert verdict.default_ms > 0
    assert "of one round" in verdict.why


def test_a_budget_in_bytes_stays_what_it_was() -> None:
    with Bench(DEMO, Settings.of(device="cpu"), [Prompt("", "Hello!")], 5) as bench:
        configuration = bench.canonical("9369600", None, None)
        assert bench.plan(configuration).slots == 300
        assert configuration.budget == "8.94 MiB"


# The profile.


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def verdict(**changes: Any) -> Verdict:
    chosen = Configuration("50%", "lfru")
    return replace(Verdict(DEFAULT, "50%", "cpu", chosen, 'it is "faster"', 0.08, 0.02, 10.0, 9.2, 9), **changes)


def keep(model: Path, **changes: Any) -> Path:
    path = profile_path(model)
    write_file(path, profile_text(model, verdict(**changes)))
    return path


def test_a_profile_comes_back(model: Path) -> None:
    path = keep(model)
    assert read_profile(model) == Profile(path, parse_budget("50%"), "cpu", parse_policy("lfru"), None, 0.08, 0.02)
    gate = Configuration("50%", "lru", "gate:d=1,p=0.05,n=2")
    keep(model, chosen=gate, vram=None, device="cuda")
    prefetch = parse_prefetch(gate.prefetch)
    assert read_profile(model) == Profile(path, None, "cuda", parse_policy("lru"), prefetch, 0.08, 0.02)
    assert stat.S_ISREG(path.stat().st_mode)
    assert path.parent == Path(os.environ["XDG_CONFIG_HOME"]) / "offmoe" / "profiles"


def test_without_a_profile_nothing_changes(model: Path) -> None:
    assert apply_profile(model, Settings.of(vram="50%")) == (Settings.of(vram="50%"), None)


def test_a_profile_is_used_and_says_so(model: Path) -> None:
    keep(model)
    for asked in (Settings.of(vram="50%"), Settings.of(), Settings.of(device="cpu")):
        settings, line = apply_profile(model, asked)
        assert settings == replace(asked, policy=parse_policy("lfru"))
        assert line == ("profile: lfru, 8.0% ± 2.0% less time per token (tuned at --vram 50%); --no-profile ignores it")


@pytest.mark.parametrize("explicit", [{"policy": "lru"}, {"prefetch": "none"}])
def test_explicit_options_win(model: Path, explicit: dict[str, str]) -> None:
    keep(model)
    settings, line = apply_profile(model, Settings.of(vram="50%", **explicit))
    assert settings == Settings.of(vram="50%", **explicit)
    assert line == "profile: ignored, because --policy or --prefetch is given"


def test_a_profile_holds_for_its_budget_and_device(model: Path) -> None:
    keep(model)
    settings, line = apply_profile(model, Settings.of(vram="25%"))
    assert settings == Settings.of(vram="25%")
    assert line == "profile: ignored, it was tuned at --vram 50% and not at 25%"
    assert apply_profile(model, Settings.of(device="cuda")) == (Settings.of(device="cuda"), None)


def test_a_default_that_stayed_says_so(model: Path) -> None:
    keep(model, chosen=None)
    settings, line = apply_profile(model, Settings.of(vram="50%"))
    assert settings == Settings.of(vram="50%")
    assert line == "profile: the defaults, nothing was faster (tuned at --vram 50%)"


def test_another_model_of_the_same_name_has_no_profile(model: Path) -> None:
    keep(model)
    before = model_key(model)
    model.write_bytes(b"GGUF" + bytes(99) + b"x")
    assert model_key(model) != before
    assert read_profile(model) is None


def test_another_machine_has_no_profile(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(model)
    monkeypatch.setattr("offmoe.app.profile.machine_name", lambda: "64 × another")
    assert read_profile(model) is None


def test_a_directory_has_a_key_and_what_is_no_model_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = model_key(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert model_key(tmp_path) != first
    os.mkfifo(tmp_path / "pipe")
    assert model_key(tmp_path / "pipe") == model_key(tmp_path / "nowhere")


GOOD = '[settings]\npolicy = "lru"\n[evidence]\ndevice = "cpu"\ngain = 0.1\nspread = 0.1\n'


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("version = ", "Invalid value"),
        ("\xff", "utf-8"),
        ("", "its version is None, expected 1"),
        ("version = 2\n" + GOOD, "its version is 2, expected 1"),
        ("version = 1\n", "expected the tables settings and evidence"),
        ("version = 1\n" + GOOD.replace("policy", "temperature"), "settings has 'temperature'"),
        ("version = 1\n" + GOOD.replace('"lru"', "7"), "policy is 7"),
        ("version = 1\n" + GOOD.replace('"lru"', '"fifo"'), "policy 'fifo' is unknown"),
        ("version = 1\n" + GOOD.replace('policy = "lru"', 'prefetch = "magic"'), "prefetch 'magic' is unknown"),
        ("version = 1\n" + GOOD.replace("cpu", "tpu"), "device is 'tpu'"),
        ("version = 1\n" + GOOD.replace("gain = 0.1", 'gain = "much"'), "gain is 'much', expected a number"),
    ],
)
def test_a_broken_profile_is_one_line_with_its_name_and_not_used(model: Path, content: str, what: str) -> None:
    path = profile_path(model)
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin1"))
    settings, line = apply_profile(model, Settings.of())
    assert settings == Settings.of()
    assert line is not None
    assert line.startswith(f"the profile {path} is damaged and ignored (")
    assert what in line
    assert "\n" not in line


# The commands.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["offmoe", *map(str, arguments)])
        capfd.readouterr()
        status = cli.main()
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Record the settings with which engines are loaded; a fake engine answers."""
    seen: list[Settings] = []

    @contextmanager
    def load(path: Path, settings: Settings, think: str | None = None) -> Iterator[fake_engine.Engine]:
        seen.append(settings)
        yield fake_engine.Engine()

    monkeypatch.setattr(cli, "load", load)
    return seen


Run = Callable[..., tuple[int, str, str]]


def test_run_uses_the_profile_and_says_so(
    command: Run, loaded: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(DEMO)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    assert command("run", "demo", "hi", "--vram", "50%", "--device", "cpu") == (
        0, "hi \n", "profile: lfru, 8.0% ± 2.0% less time per token (tuned at --vram 50%); --no-profile ignores it\n",
    )  # fmt: skip
    assert command("run", "demo", "hi", "--vram", "50%", "--device", "cpu", "--no-profile")[2] == ""
    assert [settings.policy for settings in loaded] == [parse_policy("lfru"), None]


def test_chat_uses_the_profile_and_says_so(
    command: Run, loaded: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(DEMO)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    status, _, err = command("chat", "demo", "--device", "cpu")
    assert status == 0
    assert "\nprofile: lfru, 8.0% ± 2.0% less time per token" in err
    assert command("chat", "demo", "--device", "cpu", "--no-profile")[2].count("profile") == 0
    assert [settings.policy for settings in loaded] == [parse_policy("lfru"), None]


def test_tune_writes_the_profile_and_forgets_it(command: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "tune", lambda *_: verdict())
    status, out, err = command("tune", "demo", "--vram", "50%")
    assert (status, err) == (0, "")
    path = profile_path(DEMO)
    assert out == f'it is "faster"\nprofile: {path}\n'
    found = read_profile(DEMO)
    assert found is not None
    assert found.policy == parse_policy("lfru")
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no draft is left"
    assert command("tune", "demo", "--forget") == (0, f"deleted {path}\n", "")
    assert read_profile(DEMO) is None
    assert command("tune", "demo", "--forget")[1] == f"there is no profile of {DEMO.name} on this machine\n"


def test_without_a_home_directory_the_result_is_printed(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(lab, "tune", lambda *_: verdict())
    status, out, err = command("tune", "demo")
    assert (status, out) == (0, 'it is "faster"\n')
    assert err == "no profile will be saved: there is no home directory: set HOME or XDG_CONFIG_HOME\n"


def test_a_config_directory_that_cannot_be_written_is_said_before_measuring(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc")
    monkeypatch.setattr(lab, "tune", lambda *_: pytest.fail("it was measured"))
    status, out, err = command("tune", "demo")
    assert (status, out) == (1, "")
    assert err.startswith("offmoe: cannot write /proc/offmoe")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--vram", "lots"], 1, "'lots' is not a size"),
        (["--vram", "1%"], 1, "the smallest that works is"),
        (["--minutes", "0"], 2, "Invalid value for '--minutes'"),
        (["--device", "tpu"], 1, "device 'tpu' is unknown"),
    ],
)
def test_bad_options_of_tune_are_one_line(command: Run, arguments: list[str], status: int, expected: str) -> None:
    found, out, err = command("tune", "demo", *arguments)
    assert (found, out) == (status, "")
    assert expected in err
    assert err.count("\n") == 1
