"""Commands, options, and one-line errors; the engine is fake, except where the demo answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import HELPERS

Done = subprocess.CompletedProcess[bytes]
FAKE = [sys.executable, str(HELPERS / "fake_engine.py")]
REAL = [str(Path(sys.executable).with_name("offmoe"))]


def offmoe(*arguments: str, stdin: bytes = b"", program: list[str] = FAKE, **environment: str) -> Done:
    return subprocess.run(
        [*program, *arguments],
        input=stdin,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def error_line(result: Done, status: int = 1) -> str:
    """Return the one line that a failed command prints."""
    text = result.stderr.decode()
    assert result.returncode == status, text
    assert text.startswith("offmoe: ")
    assert text.count("\n") == 1
    return text.removeprefix("offmoe: ").rstrip("\n")


@pytest.mark.parametrize("command", ["", "chat", "run", "doctor", "info", "pack"])
def test_help_is_a_page(command: str) -> None:
    result = offmoe(*command.split(), "--help", program=REAL)
    assert result.returncode == 0
    assert b"Usage: offmoe" in result.stdout
    assert (b"Examples:" in result.stdout) == bool(command)


def test_every_setting_is_an_option() -> None:
    page = offmoe("run", "--help").stdout.decode()
    names = (
        "vram ram policy scope device dtype ctx chunk stop max-tokens temperature top-k top-p min-p "
        "repeat-penalty seed greedy json raw system"
    )
    assert not [name for name in names.split() if f"--{name} " not in page]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chat", "--no-such-option"], "No such option '--no-such-option'"),
        (["chat", "--scope", "nowhere"], "'nowhere' is not one of 'layer', 'global'"),
        (["chat", "--ctx", "many"], "'many' is not a valid integer"),
        (["run"], "Missing argument 'MODEL'"),
        (["pack", "demo", "x.gguf"], "Missing option '--format'"),
        (["fly"], "No such command 'fly'"),
        (["run", "demo", "hi", "--greedy", "--temperature", "1"], "exclude each other"),
        (["run", "demo", "hi", "--raw", "--system", "be brief"], "--raw and --system exclude each other"),
    ],
)
def test_usage_errors_are_one_line_with_a_hint(arguments: list[str], expected: str) -> None:
    line = error_line(offmoe(*arguments), status=2)
    assert expected in line
    assert "--help'" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--vram", "0%"], "'0%' is not a share"),
        (["--vram", "lots"], "'lots' is not a size"),
        (["--ram", "-1"], "'-1' is not a size"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--ctx", "1"], "ctx is 1: expected a whole number, at least 16"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "2"], "top_p is 2.0"),
        (["--seed", "-1"], "seed is -1"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--stop", ""], "a stop string is empty"),
    ],
)
def test_impossible_values_are_one_line(arguments: list[str], expected: str) -> None:
    assert expected in error_line(offmoe("run", "demo", "hi", *arguments))


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["tune", "demo", "--minutes"],
        ["bench", "policies", "t.npz", "--fraction"],
        ["bench", "policies", "t.npz", "--floor"],
        ["trace", "fit", "t.npz", "-o", "map.npz", "--ridge"],
    ],
)
def test_numbers_are_finite(arguments: list[str], value: str) -> None:
    *others, option = arguments
    assert f"Invalid value for '{option}'" in error_line(offmoe(*others, f"{option}={value}"), status=2)


@pytest.mark.parametrize("name", ["./nowhere.gguf", "/no/such/directory", "no model at all", "folder/model.gguf"])
def test_missing_model_says_what_a_model_is(name: str) -> None:
    assert "give a .gguf file, a directory of safetensors" in error_line(offmoe("run", name, "hi"))


@pytest.mark.parametrize(
    ("stdin", "expected"),
    [
        (b"", "the prompt is empty"),
        (b" \n", "the prompt is empty"),
        (b"abc\xff", "standard input is not UTF-8: byte 0xff at offset 3"),
    ],
)
def test_run_rejects_an_invalid_prompt(stdin: bytes, expected: str) -> None:
    assert expected in error_line(offmoe("run", "demo", stdin=stdin))


def test_run_streams_plain_text() -> None:
    result = offmoe("run", "demo", stdin=b"one two", FORCE_COLOR="1")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"one two \n", b"")


def test_json_is_one_object_with_the_promised_keys() -> None:
    result = offmoe("run", "demo", "one two", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == "one two "
    assert answer["tokens"] == [0, 1]
    assert answer["roof"] == {"tok_s": 87.5, "limit": "floor", "source": "the fastest token of this session"}
    assert set(answer["bytes_per_token"]) == {"pcie", "nvme"}
    assert answer.keys() >= {
        "finish_reason", "prompt_tokens", "prefill_tok_s", "decode_tok_s", "ttft_s", "hit_rate", "covered",
        "late", "misses_per_token", "policy", "vram_bytes", "ram_bytes",
    }  # fmt: skip


def test_raw_prompt_is_given_as_ids() -> None:
    assert offmoe("run", "demo", "AB", "--raw").stdout == b"[65, 66] \n"


def test_engine_error_is_one_line() -> None:
    assert error_line(offmoe("run", "demo", "fail")) == "the disk is gone"


def test_debug_shows_the_traceback() -> None:
    result = offmoe("run", "demo", "fail", OFFMOE_DEBUG="1")
    assert b"Traceback" in result.stderr


def test_ctrl_c_ends_run_with_130() -> None:
    with subprocess.Popen([*FAKE, "run", "demo", "count"], stdout=subprocess.PIPE) as process:
        process.stdout.read(4)
        process.send_signal(2)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert rest.endswith(b"\n")


def test_closed_pipe_is_quiet() -> None:
    with subprocess.Popen([*FAKE, "run", "demo", "count"], stdout=-1, stderr=-1) as process:
        process.stdout.read(4)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_pack_does_not_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "there.gguf"
    out.touch()
    assert "overwrite it with --force" in error_line(offmoe("pack", "demo", str(out), "--format", "q4_0"))


def test_disk_full_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run([*FAKE, "run", "demo", "hi"], stdout=full, stderr=subprocess.PIPE)
    assert error_line(result) == "No space left on device"


def test_hub_name_without_a_network_is_one_line(tmp_path: Path) -> None:
    line = error_line(offmoe("run", "org/name", "hi", HF_ENDPOINT="http://127.0.0.1:1", HF_HOME=str(tmp_path)))
    assert "org/name is not a local path and cannot be downloaded from the hub" in line


def test_demo_answers() -> None:
    result = offmoe(
        "run",
        "demo",
        "What is the capital of France?",
        "--json",
        "--greedy",
        "--max-tokens",
        "8",
        program=REAL,
    )
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] in ("stop", "length")
    assert 0 < len(answer["tokens"]) <= 8
    assert answer["text"]
