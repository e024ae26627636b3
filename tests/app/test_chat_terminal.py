"""Chat in a pseudo-terminal: what a person sees and types, every signal in every state, and the terminal afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from paths import HELPERS
from pseudo_terminal import ENTER, Screen

FAKE = [sys.executable, str(HELPERS / "fake_engine.py")]
REAL = [sys.executable, "-m", "offmoe"]


def test_a_person_at_a_terminal(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("one two")
    person.see("2 tokens · 61.2 tok/s · first 0.21 s")
    person.say("count")
    person.see("12 13 ")
    person.child.sendintr()
    person.see("cancelled")
    person.say("/stats")
    person.see("hit rate")
    person.see("12 of 12 experts")
    assert person.leave() == 0
    history = tmp_path / "offmoe" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+count" in history.read_text()


def test_a_person_sees_reasoning_dim_or_folded(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("well now => yes")
    person.see("well now\n\nyes")
    person.say("/reasoning fold")
    person.say("let me think => no")
    person.see("▸ thinking · 2 tokens")
    person.see(r"▸ thought for 3 tokens, 0\.\d s · /reasoning show\nno\n")
    assert "▸ thinking" not in person.text()
    person.say("/reasoning show")
    person.see("let me think\n")
    person.say("/think off")
    person.see("thinking: off")
    person.say("/think hard")
    person.see("offmoe: the template does not accept 'hard'")
    assert person.leave() == 0


def test_ctrl_c_at_the_prompt_clears_the_line_then_leaves(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.wait(person.prompted)
    person.child.send("half a line")
    person.see("half a line")
    person.child.sendintr()
    person.wait(person.prompted)
    person.child.sendintr()
    person.see("press Ctrl-C again or Ctrl-D to exit")
    person.wait(person.prompted)
    person.child.sendintr()
    assert person.ended() == 0


def test_a_model_cannot_erase_the_screen(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("erase")
    person.see("1 tokens")
    assert person.leave() == 0
    assert "12 of 12 experts" in person.text()


def test_many_lines_are_one_message(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.wait(person.prompted)
    person.child.send("\x1b[200~pasted\rlines\x1b[201~")
    person.see("pasted\n.*lines")
    person.child.send("\x1b\rtyped" + ENTER)
    person.see("1 tokens")  # the fake engine splits at spaces, and there are none
    assert person.leave() == 0


def test_a_question_about_the_full_context_is_asked(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    for word in "abc":
        person.say(word)
    person.see(r"Drop the oldest turns\? \[Y/n\]")
    person.child.send(ENTER)
    person.see("oldest turns dropped to fit the context: 1")
    assert person.leave() == 0


def test_the_demo_in_a_terminal(tmp_path: Path) -> None:
    person = Screen([*REAL, "chat", "demo", "--greedy"], tmp_path)
    person.say("What is the capital of France?")
    person.see("roof")
    person.say("Tell me a very long story about a dragon.")
    person.see(r"dragon\.\n.*\w+ \w+ \w+")
    person.child.sendintr()
    person.see("cancelled")
    person.say("/stats")
    person.see("hit rate")
    assert person.leave() == 0


PRESSES = (0, 0.03, 0.06, 0.1)  # seconds


def press(person: Screen, times: Iterable[float] = PRESSES) -> None:
    """Press Ctrl-C at `times` from now."""
    began = time.monotonic()
    for at in times:
        time.sleep(max(0, began + at - time.monotonic()))
        person.child.sendintr()


def kept(home: Path) -> list[str]:
    """Return the contents of the messages of the only chat that is kept."""
    (file,) = (home / "offmoe/chats").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    return [json.loads(line)["content"] for line in file.read_text().splitlines()[1:]]


def test_ctrl_c_again_and_again_ends_the_answer_alone(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("count")
    person.see("2 3 ")
    press(person)
    person.see("cancelled")
    person.say("are you there?")
    person.see("there\\? *\\n.*61.2")
    assert person.leave() == 0
    assert person.restored()
    first, answer, *others = kept(tmp_path)
    assert (first, others) == ("count", ["are you there?", "are you there? "])
    assert answer.startswith("0 1 2 3 ")


@pytest.mark.parametrize("at", [0, 0.1, 0.25, 0.45, 0.65, 0.9])
def test_ctrl_c_before_and_after_the_tokens_of_an_answer(tmp_path: Path, at: float) -> None:
    """While the template is rendered, in the prompt's prefill, while statistics are computed, at the next prompt."""
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("slow")
    press(person, [at + press for press in PRESSES])
    person.see("61.2 tok/s")
    person.say("quick")
    person.see("quick *\\n.*61.2")
    person.say("/exit")
    assert person.ended() == 0
    assert person.restored()
    assert kept(tmp_path)[-2:] == ["quick", "quick "]


def test_ctrl_c_in_commands(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("one")
    for command in (f"/save {tmp_path}/chat.json", f"/load {tmp_path}/chat.json", "/stats"):
        person.say(command)
        press(person, [0])
    person.say("two")
    person.see("two *\\n.*61.2")
    assert person.leave() == 0
    assert person.restored()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_while_loading(tmp_path: Path, signum: signal.Signals) -> None:
    person = Screen([*FAKE, "chat"], tmp_path, FAKE_LOAD_S="60")
    person.see("loading")
    person.child.kill(signum)
    assert person.ended() == 128 + signum
    assert person.restored()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("state", ["prompt", "typing", "answer", "reasoning", "question"])
def test_the_chat_is_kept_and_the_terminal_restored_after_a_signal(
    tmp_path: Path, signum: signal.Signals, state: str
) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("first")
    person.see("61.2 tok/s")
    person.wait(person.prompted)
    if state == "typing":
        person.child.send("half a li")
        person.see("half a li")
    elif state == "answer":
        person.say("count")
        person.see("2 3 ")
    elif state == "reasoning":
        person.say("let me think for quite some time and then a bit more => well")
        person.see("\nlet me think for quite")
    elif state == "question":
        person.say(f"/save {tmp_path}/chat.json")
        person.say(f"/save {tmp_path}/chat.json")
        person.see("Overwrite it\\?")
    person.child.kill(signum)
    assert person.ended() == 128 + signum
    assert person.restored()
    contents = kept(tmp_path)
    assert contents[:2] == ["first", "first "]
    assert len(contents) == (4 if state in ("answer", "reasoning") else 2)
    assert state != "answer" or contents[3].startswith("0 1 2 3 ")


@pytest.mark.parametrize("after", [0, 0.002, 0.01, 0.03])
def test_a_message_sent_just_before_a_signal_is_kept(tmp_path: Path, after: float) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("first")
    person.see("61.2 tok/s")
    person.wait(person.prompted)
    person.child.send("second")
    person.see("› second")
    person.child.send(ENTER)
    time.sleep(after)
    person.child.kill(signal.SIGTERM)
    assert person.ended() == 128 + signal.SIGTERM
    assert person.restored()
    assert "".join(kept(tmp_path)).removeprefix("firstfirst ") in ("", "second", "secondsecond ")


def test_a_terminal_that_is_closed_ends_the_chat_and_the_chat_is_kept(tmp_path: Path) -> None:
    for message in ("first", "count"):
        person = Screen([*FAKE, "chat"], tmp_path / message)
        person.say(message)
        person.see("first *\\n.*61.2" if message == "first" else "2 3 ")
        person.child.close()
        assert person.child.exitstatus == 128 + signal.SIGHUP
        assert kept(tmp_path / message)[0] == message
    assert kept(tmp_path / "count")[1].startswith("0 1 2 3 ")


@pytest.mark.parametrize("state", ["prompt", "answer"])
def test_ctrl_z_suspends_and_fg_goes_on(tmp_path: Path, state: str) -> None:
    shell = Screen(["bash", "--norc", "-i"], tmp_path, PS1="$ ")
    shell.see(r"\$")
    shell.child.send(" ".join([*FAKE, "chat"]) + "\n")
    shell.wait(shell.prompted)
    shell.say("count" if state == "answer" else "hello")
    shell.see("2 3 " if state == "answer" else "61.2")
    if state == "prompt":
        shell.wait(shell.prompted)
        shell.child.send("half")
        shell.see("› half")
    shell.child.send("\x1a")
    shell.see("Stopped")
    shell.child.send("stty -a | grep -o '.icanon.*' ; stty -a | grep -o '.echo '\n")
    shell.see(r"\n +?echo|\n echo")
    shell.child.send("fg\n")
    if state == "answer":
        shell.see(r"fg\n(.*\n)+.*2 3 ")
        shell.child.sendintr()
        shell.see("cancelled")
    else:
        shell.see(r"fg\n(.*\n)*› half")
        shell.child.send(" a line" + ENTER)
        shell.see("half a line *\\n.*61.2")
    shell.wait(shell.prompted)
    shell.child.sendeof()
    shell.child.send("echo ended $?\n")
    shell.see("ended 0")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_run_with_the_text_so_far(tmp_path: Path, signum: signal.Signals) -> None:
    person = Screen([*FAKE, "run", "demo", "count"], tmp_path)
    person.see("2 3 ")
    person.child.kill(signum)
    assert person.ended() == 128 + signum
    assert person.restored()
    assert person.screen.cursor.x == 0


def test_an_interrupt_from_elsewhere_is_like_the_key(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.wait(person.prompted)
    person.child.kill(signal.SIGINT)
    person.see("press Ctrl-C again or Ctrl-D to exit")
    person.say("hello")
    person.see("61.2 tok/s")
    assert person.leave() == 0
    assert person.restored()


def test_the_last_chat_is_continued(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("first")
    person.see("61.2 tok/s")
    assert person.leave() == 0
    person = Screen([*FAKE, "chat", "-c"], tmp_path)
    person.see("2 messages\n› first\n +first")
    person.say("second")
    person.see("61.2 tok/s")
    person.say("/clear")
    person.see("a new conversation; the last one is kept: /load 20")
    person.say("third")
    person.see("third *\\n.*61.2 tok/s")
    person.say("/chats")
    person.see(r"name +messages +model +first message\n.* 2 .* third\n.* 4 .* first\n")
    assert person.leave() == 0
    files = sorted((tmp_path / "offmoe/chats").iterdir())
    contents = [[json.loads(line)["content"] for line in file.read_text().splitlines()[1:]] for file in files]
    assert contents == [["first", "first ", "second", "second "], ["third", "third "]]
    listed = subprocess.run(
        [*FAKE, "chat", "--list"], capture_output=True, text=True, env={**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    )
    assert re.search(r"^\S+ +2 .* third *$", listed.stdout, re.MULTILINE)


def test_a_pipe_keeps_a_chat_only_if_it_continues_one(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}

    def piped(*options: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*FAKE, "chat", *options], input=b"hello\n", capture_output=True, env=environment)

    assert piped().returncode == 0
    assert not (tmp_path / "offmoe").exists()
    assert b"there is no chat to continue yet" in piped("-c").stderr
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("first")
    person.see("61.2 tok/s")
    assert person.leave() == 0
    assert piped("-c").stdout == b"hello \n"
    assert kept(tmp_path) == ["first", "first ", "hello", "hello "]


def test_a_private_chat_is_not_kept(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat", "--no-keep"], tmp_path)
    person.say("secret")
    person.see("61.2 tok/s")
    assert person.leave() == 0
    assert not (tmp_path / "offmoe").exists()


def test_without_a_place_for_state_a_chat_goes_on(tmp_path: Path) -> None:
    for environment, reason in (
        ({"XDG_STATE_HOME": "/dev/null"}, "/dev/null/offmoe: Not a directory"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/dev/null"}, "/dev/null/.local/state/offmoe: Not a directory"),
    ):
        person = Screen([*FAKE, "chat"], tmp_path, **environment)
        person.see(f"the input history is not kept: {reason}")
        person.see("this chat is not kept: /dev/null")
        for message in ("one", "two"):
            person.say(message)
            person.see(f"{message} *\\n.*61.2 tok/s")
        assert "Press ENTER" not in person.raw
        assert person.leave() == 0


def test_a_history_that_can_no_longer_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "offmoe/chats").mkdir(parents=True)
    (tmp_path / "offmoe/history").symlink_to("/dev/full")
    person = Screen([*FAKE, "chat"], tmp_path)
    person.see(r"the input history is not kept:[\s\S]*history\s+is\s+not\s+a\s+regular\s+file")  # the path may be long
    person.say("one")
    assert person.leave() == 0
    (tmp_path / "offmoe/history").unlink()
    person = Screen([*FAKE, "chat"], tmp_path)
    person.wait(person.prompted)
    (tmp_path / "offmoe/history").unlink()
    (tmp_path / "offmoe/history").symlink_to("/dev/full")
    for message in ("one", "two"):
        person.say(message)
        person.see(f"{message} *\\n.*61.2 tok/s")
    assert person.text().count("the input history is not kept") == 1
    assert "Press ENTER" not in person.raw
    assert person.leave() == 0


def test_messages_of_several_lines_and_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some notes")
    person = Screen([*FAKE, "chat"], tmp_path)
    person.wait(person.prompted)
    person.child.send(f'"""{ENTER}one{ENTER}/exit{ENTER}two"""{ENTER}')
    person.see("\none\n/exit\ntwo *\n.*61.2")
    person.say(f"/read {tmp_path}/no")
    person.see("offmoe: cannot read")
    person.wait(person.prompted)
    person.child.send(f"look at @{tmp_path}/no\t")
    person.see("look at @.*/notes.txt")
    person.child.send(ENTER)
    person.see(r"attached: .*/notes.txt \(10 characters\)")
    person.see("some notes\n")
    person.wait(person.prompted)
    person.child.send("/edi\t")
    person.see("› /edit")
    person.child.send(ENTER)
    person.see("› /edit\n› look at @")
    person.child.send("\x15three" + ENTER)
    person.see("\nthree *\n.*61.2")
    assert person.leave() == 0


@pytest.mark.parametrize("columns", [40, 80])
def test_what_is_displayed_fits_the_width(tmp_path: Path, columns: int) -> None:
    person = Screen([*FAKE, "chat"], tmp_path, columns)
    person.say("/help")
    person.see("exit the chat")
    person.wait(person.prompted)
    person.child.send("well then, let me think about what to say for a while => **Words** that go on to the end, `x`\r")
    person.see("61.2 tok/s.* context 2%")
    assert person.leave() == 0
    text = re.sub(r"\s+", " ", person.text())
    assert "well then, let me think about what to say for a while Words that go on to the end, x" in text
    assert re.search(r"61\.2 tok/s( · .*)? · context 2%\n", person.text())


def test_a_plain_or_dumb_terminal_has_the_text_as_it_is(tmp_path: Path) -> None:
    for options, environment in ((["--plain"], {}), ([], {"TERM": "dumb"})):
        person = Screen([*FAKE, "chat", *options], tmp_path, **environment)
        person.wait(lambda person=person: "›" in person.text())
        person.child.send("**a** `b`" + ENTER)
        person.see(r"\n\*\*a\*\* `b` *\n")
        person.wait(lambda person=person: person.text().count("›") == 2 + (person.text().count("› **a")) - 1)
        person.child.sendeof()
        assert person.ended() == 0


def test_what_is_typed_ahead_is_not_written_into_the_answer(tmp_path: Path) -> None:
    person = Screen([*FAKE, "chat"], tmp_path)
    person.say("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 => twenty")
    person.see("\n1 2 3 ")
    person.child.send("ahead" + ENTER)
    person.see("19 20\n\ntwenty\n.*\n› ahead\nahead *\n.*61.2")
    assert person.text().count("ahead") == 2
    assert person.leave() == 0
    assert person.restored()
