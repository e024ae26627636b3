"""The prompt of `offmoe run`: PROMPT, standard input and files together; what is said of an answer that was cut."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from paths import HELPERS

FAKE = [sys.executable, str(HELPERS / "fake_engine.py"), "run", "demo"]


def run(*arguments: str, stdin: bytes | int = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    given = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    return subprocess.run(
        [*FAKE, *arguments], capture_output=True, timeout=60, env={**os.environ, **environment}, **given
    )  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["Summarise"], b"a doc\n", "Summarise\n\na doc\n"),
        (["Summarise"], b"\xef\xbb\xbfa doc", "Summarise\n\na doc"),
        (["Summarise"], b"", "Summarise"),
        (["Summarise"], b" \n", "Summarise"),
        (["-"], b"a doc", "a doc"),
        ([], b"a doc", "a doc"),
        (["\ufeffhello"], b"", "hello"),
    ],
)
def test_prompt_and_standard_input(arguments: list[str], stdin: bytes, prompt: str) -> None:
    result = run(*arguments, stdin=stdin)
    assert (result.returncode, result.stdout.decode(), result.stderr) == (0, f"{prompt} \n", b"")


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_what_a_template_leaves_out_is_told(more: list[str]) -> None:
    result = run("hi", "--system", "dropped", *more)
    assert (result.returncode, result.stderr) == (0, b"the template leaves it out\n")


def test_files_follow(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("first\n")
    (tmp_path / "b").write_text("second\n")
    files = ["-f", f"{tmp_path}/a", "--file", f"{tmp_path}/b"]
    both = f"{tmp_path}/a:\n```\nfirst\n```\n\n{tmp_path}/b:\n```\nsecond\n```"
    assert run("Compare", *files).stdout.decode() == f"Compare\n\n{both} \n"
    assert run(*files).stdout.decode() == f"{both} \n"
    assert run("Compare", *files, stdin=b"x").stdout.decode() == f"Compare\n\nx\n\n{both} \n"
    missing = run("Compare", "-f", f"{tmp_path}/c")
    assert (missing.returncode, missing.stderr.decode()) == (
        1, f"offmoe: cannot read {tmp_path}/c: No such file or directory\n",
    )  # fmt: skip


def test_standard_input_from_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "doc").write_text("a doc")
    with (tmp_path / "doc").open() as doc:
        assert run("Summarise", stdin=doc.fileno()).stdout == b"Summarise\n\na doc \n"


def test_devices_are_not_read() -> None:
    for device in ("/dev/null", "/dev/zero"):
        with open(device, "rb") as file:
            assert run("hello", stdin=file.fileno()).stdout == b"hello \n"


def test_a_terminal_is_read_only_without_a_prompt() -> None:
    controller, terminal = pty.openpty()
    assert run("hello", stdin=terminal).stdout == b"hello \n"
    os.write(controller, b"typed\n\x04")
    result = run(stdin=terminal)
    assert result.stdout == b"typed\n \n"
    assert result.stderr == b"reading standard input; Ctrl-D ends it\n"
    os.write(controller, b"typed\n\x04")
    assert run("-", stdin=terminal).stdout == b"typed\n \n"


def test_a_silent_pipe_is_announced() -> None:
    with subprocess.Popen([*FAKE, "hello"], stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == b"reading standard input; </dev/null if there is none\n"
        process.stdin.close()
        assert process.stdout.read() == b"hello \n"


def test_statistics_on_request() -> None:
    full = "2 tokens · 61.2 tok/s · first 0.21 s · hit 61.2% · 3.6 MiB/token paged · roof 88 tok/s (floor) 70%"
    for options, line in (
        (["--stats", "a b"], f"{full} · context 1%\n"),
        (["a b", "--stats=short"], "2 tokens · 61.2 tok/s · context 1%\n"),
        (["--stats", "short", "a b"], "2 tokens · 61.2 tok/s · context 1%\n"),
        (["--stats", "off", "a b"], ""),
        (["a b"], ""),
    ):
        result = run(*options)
        assert (result.stdout, result.stderr.decode()) == (b"a b \n", line)
    assert run("--stats", "a b", "--json").stderr == b""


@pytest.mark.parametrize(
    ("reason", "prompt", "note"),
    [
        ("length", "a b", "the answer was cut after 2 tokens: --max-tokens allows no more\n"),
        ("context", "a b", "the answer was cut because the context of 1000 tokens is full: give a larger --ctx\n"),
        (
            "length",
            "a => ",
            "the answer is empty: all 2 tokens are reasoning; raise --max-tokens, or try --think off\n",
        ),
        ("stop", "a => ", "the answer is empty: all 2 tokens are reasoning; raise --max-tokens, or try --think off\n"),
    ],
)
def test_an_answer_that_was_cut_says_so(reason: str, prompt: str, note: str) -> None:
    result = run(prompt, FAKE_FINISH=reason)
    assert result.returncode == 0
    assert result.stderr.decode().endswith(note)
    assert run(prompt, "--json", FAKE_FINISH=reason).stderr == b""
