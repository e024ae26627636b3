"""Random command lines, chats' lines and /set lines: an exit code of 0, 1 or 2, an error on one line, no traceback."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import fake_engine
import pytest
from chat_script import Script
from exhaustive import cases

from offmoe.app import cli
from offmoe.app.chat import Chat
from offmoe.app.cli import main
from offmoe.errors import OffmoeError
from offmoe.settings import Sampling

COMMANDS = ("chat", "run", "info", "doctor", "pack", "trace", "bench", "tune", "help", "--version", "-h")
OPTIONS = """
    --vram --ram --policy --scope --device --dtype --ctx --chunk --kv --prefetch --no-profile --max-tokens --stop
    --temperature --top-k --top-p --min-p --repeat-penalty --seed --greedy --system --think --reasoning --raw --json
    --stats --plain -f --file --list -c --continue --no-keep --commands --minutes --fraction --floor --slots --ridge
    --format --force -o --tokens --nothing -x -- -
"""
VALUES = [
    "", " ", "0", "1", "-1", "7", "1.5", "nan", "inf", "-inf", "1e999", "1e-9", str(2**63), str(2**64), "9" * 400,
    "8GiB", "50%", "nan%", "lru", "crf:h=64", "crf:h", "gate:d=1", "none", "on", "off", "low", "line", "short", "dim",
    "cpu", "cuda:9", "f32", "int8", "same", "layer", "hello", "--", "-", "=", "a=b", "\udcff", "\x00", "\x1b[2J", "é",
    "/dev/null", "/nowhere/x", "{tmp}", "{tmp}/doc.txt", "{tmp}/new.gguf", "demo", "q4_0", "'", '"', '"a', '"\\n"',
]  # fmt: skip
LINES = [
    "/{command} {value}", "/{command}", "/set {name}={value}", "/set {name} {value}", "/set {value}", "{value}",
    "@{value}", '"""{value}', "//{value}", "/{value}", "{value} {value}", "/set stop \"{value}\" '{value}'",
]  # fmt: skip
NAMES = "help retry edit undo clear read system set think reasoning stats save load chats quit hlep"
FIELDS = "temperature top_k top-p min_p repeat_penalty seed max_tokens stop greedy system think stats reasoning x"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of one's own, with a file to read."""
    (tmp_path / "doc.txt").write_text("a document")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def value(random: random.Random, place: Path) -> str:
    return random.choice(VALUES).replace("{tmp}", str(place))


def command_line(random: random.Random, place: Path) -> list[str]:
    """Return arguments: mostly a command, a model, and options with and without values."""
    line = [random.choice((*COMMANDS, "chat", "run", "run"))] if random.random() < 0.95 else []
    line += ["demo" if random.random() < 0.8 else value(random, place)] if random.random() < 0.9 else []
    for _ in range(random.choice((0, 1, 1, 1, 2, 4))):
        name, text = random.choice(OPTIONS.split()), value(random, place)
        line += random.choice(([name], [name, text], [f"{name}={text}"], [text]))
    return [argument.replace("\0", "") for argument in line]


@pytest.mark.parametrize("seed", cases(range(20), default=[0, 1]))
def test_random_command_lines(
    seed: int, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """100 of each seed. The engine is fake and the long commands end before they begin their work."""
    generator = random.Random(seed)
    monkeypatch.setattr(cli, "load", lambda path, settings, think=None: fake_engine.Engine.load(str(path), think=think))
    monkeypatch.setattr("offmoe.app.doctor.run_checks", lambda path: [])
    monkeypatch.setattr("offmoe.lab.tune.halving.tune", lambda *_, **__: (_ for _ in ()).throw(OffmoeError("not now")))
    for _ in range(100):
        line = command_line(generator, place)
        monkeypatch.setattr(sys, "argv", ["offmoe", *line])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n/exit\n")))
        status = main()
        out, err = capfd.readouterr()
        assert status in (0, 1, 2), line
        assert "Traceback" not in out + err, line
        errors = [text for text in err.splitlines() if text.startswith("offmoe: ")]
        assert len(errors) == (status > 0), (line, err)


@pytest.mark.parametrize("seed", cases(range(20), default=[0, 1, 2]))
def test_random_lines_of_a_chat(seed: int, place: Path) -> None:
    """100 of each seed in one chat of a person."""
    generator = random.Random(seed)
    ui = Script()
    chat = Chat(fake_engine.Engine(), ui, "model", Sampling())  # type: ignore[arg-type]
    for _ in range(100):
        line = generator.choice(LINES)
        while "{value}" in line:
            line = line.replace("{value}", value(generator, place), 1)
        line = line.replace("{command}", generator.choice(NAMES.split())).replace(
            "{name}", generator.choice(FIELDS.split())
        )
        ui.lines, ui.agrees = [line, "", ""], generator.random() < 0.5
        chat.loop()
        roles = [turn["role"] for turn in chat.conversation.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2), line
        assert all("\n" not in note for note in ui.notes if note.startswith("offmoe: ")), line
        ui.notes.clear()
