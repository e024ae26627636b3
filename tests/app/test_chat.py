"""Chat: its loop with scripted input, through a pipe, and in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import fake_engine
import pytest
from chat_script import Script
from paths import HELPERS

from offmoe.app.chat import Chat
from offmoe.app.commands import COMMANDS
from offmoe.app.terminal import clean
from offmoe.errors import OffmoeError
from offmoe.settings import Sampling

FAKE = [sys.executable, str(HELPERS / "fake_engine.py")]


def talk(*lines: str, **person: bool) -> tuple[Chat, Script]:
    """Run a chat whose input is `lines`."""
    ui = Script(*lines, **person)
    chat = Chat(fake_engine.Engine(), ui, "model", Sampling())  # type: ignore[arg-type]
    chat.loop()
    return chat, ui


def contents(chat: Chat) -> list[str]:
    return [turn["content"] for turn in chat.conversation.turns]


def test_answers_become_part_of_the_conversation_with_their_tokens() -> None:
    chat, ui = talk("one two", "three")
    assert ui.answers == "one two \nthree \n"
    assert contents(chat) == ["one two", "one two ", "three", "three "]
    assert chat.conversation.turns[1]["tokens"] == [0, 1]
    assert chat.engine.prompts[1] == chat.conversation.turns[:3]  # type: ignore[attr-defined]


def test_stats_line() -> None:
    _, ui = talk("one two three")
    line = "3 tokens · 61.2 tok/s · first 0.21 s · hit 61.2% · 3.6 MiB/token paged · roof 88 tok/s (floor) 70%"
    assert ui.notes == [f"{line} · context 1%"]


def test_what_a_template_leaves_out_is_told_once() -> None:
    _, ui = talk("/system dropped", "a", "/undo", "b")
    assert ui.notes.count("the template leaves it out") == 1


def test_empty_messages_are_not_sent_and_paths_are_no_commands() -> None:
    chat, _ = talk("", "  ", "/usr/bin is what?")
    assert contents(chat)[0] == "/usr/bin is what?"


def test_full_context_drops_the_oldest_turns_and_keeps_the_system_prompt() -> None:
    chat, ui = talk("/system be brief", "a", "b", "c")  # the fake context holds three messages
    assert len(ui.questions) == 2
    assert contents(chat) == ["c", "c "]
    assert chat.engine.prompts[-1][0] == {"role": "system", "content": "be brief"}  # type: ignore[attr-defined]
    assert "oldest turns dropped to fit the context: 1" in ui.notes


def test_dropping_many_turns_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, ui = talk("a", "b")
    monkeypatch.setattr(fake_engine, "CTX", 1)
    chat.handle("c")
    assert len(ui.questions) == 1
    assert ui.notes[-1] == "oldest turns dropped to fit the context: 2"


def test_full_context_refused_leaves_the_conversation_as_it_was() -> None:
    chat, ui = talk("a", "b", "c", agrees=False)
    assert contents(chat) == ["a", "a ", "b", "b "]
    assert ui.notes[-1].startswith("offmoe: the conversation needs 5 tokens and the context holds 3")


def test_a_message_too_long_alone_says_so_and_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ui = Script("b")
    chat = Chat(fake_engine.Engine(), ui, "model", Sampling())  # type: ignore[arg-type]
    Chat.handle(chat, "a")
    monkeypatch.setattr(fake_engine, "CTX", 0)
    chat.loop()
    assert contents(chat) == ["a", "a "]
    assert ui.notes[-1].startswith("offmoe: this message alone needs 1 tokens")


def test_an_error_is_a_line_for_a_person_and_the_end_of_a_pipe() -> None:
    chat, ui = talk("fail", "go on")
    assert ui.notes[0] == "offmoe: the disk is gone"
    assert contents(chat) == ["go on", "go on "]
    with pytest.raises(OffmoeError):
        talk("fail", interactive=False)


def test_what_is_still_read_is_said_after_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_engine.Engine, "loading", lambda self: f"{len(self.prompts)} of 2 experts read")
    _, ui = talk("a", "b")
    assert ui.notes[1::2] == ["1 of 2 experts read", "2 of 2 experts read"]


NAMES = (
    "help", "retry", "edit", "undo", "clear", "read", "system", "set", "think", "reasoning", "stats", "save", "load",
    "chats", "exit",
)  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["-OO"]])
def test_every_command_is_in_the_help(flags: list[str]) -> None:
    """Even where Python drops docstrings."""
    command = [FAKE[0], *flags, *FAKE[1:], "chat", "--commands"]
    page = subprocess.run(command, input=b"/help\n", capture_output=True, timeout=60).stdout.decode()
    assert tuple(COMMANDS) == NAMES
    assert all(re.search(rf"^/{name} .*{re.escape(COMMANDS[name].text)}", page, re.M) for name in NAMES)


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("/fly", "offmoe: /fly is not a command: /help lists them"),
        ("/stats", "offmoe: there is no answer yet"),
        ("/save", "offmoe: the file name is missing: give one, as in /save chat.json"),
        ("/save /nowhere/chat.json", "offmoe: cannot write /nowhere/chat.json: No such file or directory"),
        ("/load /nowhere", "offmoe: cannot read /nowhere: No such file or directory"),
        ("/set heat 1", "offmoe: /set has no option 'heat': expected temperature, top_k, top_p, min_p,"),
        ("/set top_k 1.5", "offmoe: top_k is '1.5': expected a number, or none"),
        ("/set top_p 7", "offmoe: top_p is 7.0: expected a number from 0 to 1"),
        ("/think", "thinking: default of the template"),
        ("/think off", "thinking: off"),
        ("/think none", "thinking: default of the template"),
        ("/think hard", "offmoe: the template does not accept 'hard'"),
        ("/reasoning", "reasoning: dim"),
        ("/reasoning hide", "reasoning: hide"),
        ("/reasoning loud", "offmoe: reasoning is 'loud': expected dim, fold, hide or show"),
        ("/reasoning show", "offmoe: the last answer has no reasoning"),
        ("/system", "system prompt: none"),
        ("/system be brief", "system prompt: be brief"),
    ],
)
def test_commands_answer_in_one_note(line: str, note: str) -> None:
    _, ui = talk(line)
    assert ui.notes[0].startswith(note)


def test_set_changes_the_sampling() -> None:
    chat, _ = talk("/set temperature 0.5", "/set top_k 3", "/set stop END", "/set seed 1", "/set seed none")
    assert chat.sampling == Sampling(temperature=0.5, top_k=3, stop=("END",))


def test_set_shows_the_value_in_effect() -> None:
    """Value in effect is shown even if it was not set: the model's own, or offmoe's default."""
    _, ui = talk("/set temperature", "/set temperature 0.5", "/set temperature none")
    assert ui.notes == ["temperature=0.7", "temperature=0.5", "temperature=0.7"]


def test_reasoning_is_dim_folded_or_hidden_and_never_part_of_the_answer() -> None:
    _, dim = talk("well now => yes")
    assert (dim.answers, dim.thoughts) == ("yes \n", "well now \n\n")
    _, folded = talk("/reasoning fold", "well now => yes", "/reasoning show")
    assert folded.statuses == ["▸ thinking · 1 tokens", "▸ thinking · 2 tokens", ""]
    assert re.fullmatch(r"▸ thought for 2 tokens, 0\.\d s · /reasoning show", folded.notes[1])
    assert (folded.answers, folded.thoughts) == ("yes \n", "well now \n")
    _, hidden = talk("/reasoning hide", "well now => yes")
    assert (hidden.answers, hidden.thoughts, hidden.statuses, len(hidden.notes)) == ("yes \n", "", [], 2)


def test_reasoning_without_an_answer_ends_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_engine.Engine, "cancelled", False, raising=False)
    monkeypatch.setattr(fake_engine.Engine, "_answer", lambda *_: iter([fake_engine.Piece("well", 0, reasoning=True)]))
    _, ui = talk("a")
    assert (ui.answers, ui.thoughts) == ("\n", "well\n")


def test_reasoning_is_kept_apart_in_the_conversation_and_in_its_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    chat, _ = talk("well now => yes", f"/save {file}", "go on")
    assert chat.conversation.turns[1] == {"role": "assistant", "content": "yes ", "reasoning": "well now "}
    assert chat.engine.prompts[1] == chat.conversation.turns[:3]  # type: ignore[attr-defined]
    assert talk(f"/load {file}")[0].conversation.turns == chat.conversation.turns[:2]


def test_reset_forgets_all_but_the_system_prompt() -> None:
    chat, _ = talk("/system be brief", "a", "/reset")
    assert chat.conversation.messages() == [{"role": "system", "content": "be brief"}]
    assert chat.engine.resets == 1  # type: ignore[attr-defined]


def test_exit_leaves() -> None:
    _, ui = talk("/exit", "never said")
    assert ui.lines == ["never said"]


def test_a_saved_chat_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    saved, _ = talk("/system Sei knapp: Größe", "a", f"/save {file}")
    loaded, _ = talk(f"/load {file}")
    assert loaded.conversation == saved.conversation
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_another_model_encodes_a_saved_chat_anew(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    talk("a", f"/save {file}")
    file.write_text(file.read_text().replace('"model": "model"', '"model": "other"'))
    loaded, _ = talk(f"/load {file}")
    assert [sorted(turn) for turn in loaded.conversation.turns] == [["content", "role"]] * 2


GOOD = {
    "offmoe_chat": 1,
    "model": "model",
    "system": None,
    "turns": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tokens": [1]}],
}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", 'expected an object with "offmoe_chat": 1'),
        (json.dumps(GOOD | {"offmoe_chat": 2}), 'expected an object with "offmoe_chat": 1'),
        (json.dumps(GOOD | {"turns": 3}), "expected model, system and turns"),
        (json.dumps(GOOD | {"turns": GOOD["turns"][::-1]}), "expected a message of role user"),
        (json.dumps(GOOD).replace('"b"', "5"), "a message's content is not text"),
        (json.dumps(GOOD).replace('"b"', '"\\ud800"'), "surrogates not allowed"),
        (json.dumps(GOOD).replace('"tokens": [1]', '"reasoning": 7'), "a message's reasoning is not text"),
        (json.dumps(GOOD).replace("[1]", "[100]"), "tokens are not ids below 100"),
        (json.dumps(GOOD).replace("[1]", "[true]"), "tokens are not ids below 100"),
    ],
)
def test_a_damaged_saved_chat_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "chat.json"
    file.write_text(text)
    chat, ui = talk("a", f"/load {file}")
    assert contents(chat) == ["a", "a "]
    assert ui.notes[-1].startswith(f"offmoe: {file} is not a chat written by /save: ")
    assert reason in ui.notes[-1]


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b[2J\x07b\r\n\tc\x9b1m\x7f\x00é") == "a[2Jb\n\tc1mé"


def piped(stdin: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    return subprocess.run([*FAKE, "chat", *options], input=stdin, capture_output=True, timeout=60, env=environment)


def test_in_a_pipe_stdout_is_the_answers_without_escape_codes() -> None:
    result = piped(b"one two\n/stats\nthree", "--commands")
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 0
    assert (lines[0], lines[-1]) == ("one two ", "three ")
    assert any(line.startswith("hit rate") and "61.2%" in line for line in lines)
    assert b"\x1b" not in result.stdout + result.stderr
    assert result.stderr.decode().splitlines()[1].startswith("2 tokens · 61.2 tok/s")


def test_in_a_pipe_reasoning_is_on_stderr() -> None:
    result = piped(b"well now => yes\n/reasoning fold\nwell => no\n", "--commands")
    assert result.stdout == b"yes \nno \n"
    assert b"well now \n\n" in result.stderr
    assert re.search("▸ thought for 1 tokens, 0\\.\\d s\n", result.stderr.decode())


def test_in_a_pipe_old_turns_are_dropped_unasked() -> None:
    result = piped(b"a\nb\nc\n")
    assert result.returncode == 0
    assert b"oldest turns dropped to fit the context: 1" in result.stderr


def test_in_a_pipe_an_error_ends_the_chat() -> None:
    result = piped(b"a\nfail\nb\n")
    assert (result.returncode, result.stdout) == (1, b"a \n")
    assert result.stderr.endswith(b"offmoe: the disk is gone\n")


def test_in_a_pipe_the_first_byte_that_is_no_utf8_is_named() -> None:
    result = piped(b"a\nb\xff\n")
    assert result.returncode == 1
    assert b"standard input is not UTF-8: byte 0xff at offset 3\n" in result.stderr


def test_in_a_pipe_ctrl_c_ends_the_chat() -> None:
    with subprocess.Popen([*FAKE, "chat"], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"count\nnever\n")
        process.stdin.close()
        process.stdout.read(4)
        process.send_signal(2)
        assert b"never" not in process.stdout.read()
    assert process.returncode == 130
