"""Commands of a chat: what is one, what each does, and that a line that is nearly one is not sent to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_engine
import pytest
from chat_script import Script

from offmoe.app.chat import Chat, find_command, plain_message
from offmoe.app.chat_store import ChatStore
from offmoe.app.commands import BY_NAME
from offmoe.app.set_option import parse_strings, split_assignment
from offmoe.errors import OffmoeError
from offmoe.settings import Sampling


def talk(*lines: str, store: ChatStore | None = None, **person: bool) -> tuple[Chat, Script]:
    """Run a chat whose input is `lines`."""
    ui = Script(*lines, **person)
    chat = Chat(fake_engine.Engine(), ui, "model", Sampling(), store=store)  # type: ignore[arg-type]
    chat.loop()
    return chat, ui


def contents(chat: Chat) -> list[str]:
    return [turn["content"] for turn in chat.conversation.turns]


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("/help", ("help", "")),
        ("  /help ", ("help", "")),
        ("/HELP", ("help", "")),
        ("/?", ("?", "")),
        ("/bye", ("bye", "")),
        ("/set top_k 3", ("set", "top_k 3")),
        ("/system\tbe brief", ("system", "be brief")),
        ('/system """two\nlines"""', ("system", "two\nlines")),
        ('/system """\ntwo\nlines\n"""', ("system", "two\nlines")),
    ],
)
def test_lines_that_are_commands(line: str, command: tuple[str, str]) -> None:
    assert find_command(line) == command


@pytest.mark.parametrize(
    "line",
    [
        "help",
        "hello /help",
        "/etc/passwd",
        "/etc/passwd is a file",
        "/ is root",
        "/",
        "//",
        "//help",
        "/* a comment */",
        "/help\nand more lines",
        "/save x\ny",
        '"""\n/help\n"""',
        "/2 + 3/",
        "/é",
    ],
)
def test_lines_that_are_text(line: str) -> None:
    assert find_command(line) is None


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("/hlep", "did you mean /help?"),
        ("/hepl", "did you mean /help?"),
        ("/exti", "did you mean /exit?"),
        ("/retyr", "did you mean /retry?"),
        ("/Sytem be brief", "did you mean /system?"),
        ("/help!", "did you mean /help?"),
        ("/set:", "did you mean /set?"),
        ("/ help", "did you mean /help?"),
        ("/fly", "/help lists them all"),
        ("/tmp is full", "/help lists them all"),
    ],
)
def test_lines_that_are_nearly_commands_are_not_sent(line: str, hint: str) -> None:
    chat, ui = talk(line)
    assert contents(chat) == []
    assert ui.notes[0].startswith("offmoe: /")
    assert hint in ui.notes[0]
    assert "with //" in ui.notes[0]


@pytest.mark.parametrize("name", [name for name, command in BY_NAME.items() if not command.usage])
def test_commands_without_an_argument_refuse_one(name: str) -> None:
    _, ui = talk("a", f"/{name} of it all")
    assert ui.notes[-1].startswith(f"offmoe: /{name} takes no argument")


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("//help", "/help"),
        (" //x", " /x"),
        ("a // b", "a // b"),
        ('"""one"""', "one"),
        ('"""\none\n two\n"""', "one\n two"),
        ('"""never closed', "never closed"),
        ('say """this"""', 'say """this"""'),
    ],
)
def test_messages_are_unquoted(typed: str, sent: str) -> None:
    assert plain_message(typed) == sent


def test_text_from_a_pipe_is_text() -> None:
    ui = Script("/save x", "/exit", "//a", '"""b"""', "@/etc/passwd", interactive=False)
    ui.commands = False
    chat = Chat(fake_engine.Engine(), ui, "model", Sampling())  # type: ignore[arg-type]
    chat.loop()
    assert [prompt[-1]["content"] for prompt in chat.engine.prompts if prompt[-1]["role"] == "user"] == [
        "/save x", "/exit", "//a", "//a", '"""b"""', '"""b"""', "@/etc/passwd", "@/etc/passwd",
    ]  # fmt: skip  # twice: the oldest turns are dropped from the third on


def test_retry_answers_the_last_message_again() -> None:
    chat, ui = talk("a", "b", "/retry")
    assert contents(chat) == ["a", "a ", "b", "b "]
    assert ui.answers == "a \nb \nb \n"
    assert len(chat.engine.prompts) == 3  # type: ignore[attr-defined]


def test_edit_changes_the_last_message() -> None:
    chat, ui = talk("a", "b", "/edit", "better")
    assert ui.edited == ["b"]
    assert contents(chat) == ["a", "a ", "better", "better "]
    chat, ui = talk("a", "/edit", "")  # left with Ctrl-C
    assert contents(chat) == ["a", "a "]
    assert ui.notes[-1] == "nothing changed"


def test_undo_removes_the_last_message() -> None:
    chat, ui = talk("a", "b", "/undo")
    assert contents(chat) == ["a", "a "]
    assert ui.notes[-1] == "removed with its answer: b"


@pytest.mark.parametrize("command", ["/retry", "/edit", "/undo"])
def test_without_a_message_there_is_none_to_change(command: str) -> None:
    _, ui = talk(command)
    assert ui.notes == ["offmoe: there is no message yet: send one first"]


def test_a_failed_retry_or_edit_restores_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, ui = talk("a", "/edit", "fail")
    assert contents(chat) == ["a", "a "]
    assert ui.notes[-1] == "offmoe: the disk is gone"
    monkeypatch.setattr(fake_engine, "CTX", 0)
    chat.ui.lines.append("/retry")  # type: ignore[attr-defined]
    chat.loop()
    assert contents(chat) == ["a", "a "]


def test_clear_asks_where_a_conversation_would_be_lost(tmp_path: Path) -> None:
    chat, ui = talk("a", "/clear", agrees=False)
    assert contents(chat) == ["a", "a "]
    assert ui.questions == ["The conversation so far (2 messages) is not saved. Give it up?"]
    for lines in (["/clear"], [f"/save {tmp_path}/chat.json", "/clear"]):
        _, ui = talk(*(["a"] if len(lines) > 1 else []), *lines, agrees=False)
        assert ui.questions == []
        assert ui.notes[-1] == "a new conversation"
    chat, ui = talk("a", "/clear", "b", store=ChatStore(tmp_path, "model"), agrees=False)
    assert (ui.questions, contents(chat)) == ([], ["b", "b "])
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_load_shows_what_it_brings_and_asks(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    talk("/system be brief", "a", "b", f"/save {file}")
    chat, ui = talk("c", f"/load {file}", agrees=False)
    assert contents(chat) == ["c", "c "]
    chat, ui = talk("c", f"/load {file}")
    assert len(ui.questions) == 1
    assert contents(chat) == ["b", "b "]  # the fake context drops the oldest turn
    assert ui.notes[-3:] == ["chat: 2 messages, system prompt: be brief", "› b", "  b"]


def test_save_asks_before_it_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text("precious")
    _, ui = talk("a", f"/save {file}", agrees=False)
    assert file.read_text() == "precious"
    assert (ui.questions, ui.notes[-1]) == (
        [f"{file} exists. Overwrite it?"],
        f"offmoe: {file} exists: choose another name",
    )
    _, ui = talk("a", f"/save {file}")
    assert ui.notes[-1] == f"saved: {file}"
    with pytest.raises(OffmoeError, match="exists: choose another name"):
        talk("a", f"/save {file}", interactive=False)


def test_files_become_part_of_a_message(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"\xef\xbb\xbfSome ```notes```\n")
    (tmp_path / "two words.txt").write_text("more")
    notes = f"{tmp_path}/notes.txt:\n````\nSome ```notes```\n````"
    chat, ui = talk(f"/read {tmp_path}/notes.txt", "Summarise", "again")
    assert ui.notes[0] == f"goes with the next message: {tmp_path}/notes.txt (17 characters)"
    assert contents(chat)[0::2] == [f"Summarise\n\n{notes}", "again"]
    chat, ui = talk(f"What is in @{tmp_path}/notes.txt?")
    assert contents(chat)[0] == f"What is in @{tmp_path}/notes.txt?\n\n{notes}"
    assert ui.notes[0] == f"attached: {tmp_path}/notes.txt (17 characters)"
    chat, _ = talk(f'@"{tmp_path}/two words.txt" and @{tmp_path}/two, a@b.c, @nobody')
    assert contents(chat)[0].count("more") == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"a\0b", "zero byte"),
        (b"\xff", "is not UTF-8: byte 0xff at offset 0"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    _, ui = talk(f"/read {file}", "/read /dev/zero", "/read")
    assert reason in ui.notes[0]
    assert ui.notes[1] == "offmoe: /dev/zero is not a regular file: give a text file"
    assert ui.notes[2] == "offmoe: the file name is missing: give one, as in /read notes.txt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("top_k 3", ("top_k", "3")),
        ("top_k=3", ("top_k", "3")),
        ("top-k = 3", ("top_k", "3")),
        ("--top-k 3", ("top_k", "3")),
        ("Temperature", ("temperature", "")),
        ('stop="\\n"', ("stop", '"\\n"')),
        ("stop = a = b", ("stop", "a = b")),
    ],
)
def test_names_of_options_and_values(text: str, expected: tuple[str, str]) -> None:
    assert split_assignment(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("END", ("END",)),
        ("two words", ("two words",)),
        (r"\n", (r"\n",)),
        (r'"\n"', ("\n",)),
        (r"'\n\t\\'", ("\n\t\\",)),
        (r'"a" "b\"c"', ("a", 'b"c')),
        (r'"a", "b"', ("a", "b")),
        ('"two\nlines"', ("two\nlines",)),
    ],
)
def test_strings_of_stop(text: str, expected: tuple[str, ...]) -> None:
    assert parse_strings(text) == expected


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ('/set stop="\\n"', "stop=('\\n',)"),
        ("/set stop none", "stop=()"),
        ('/set stop ""', "offmoe: a stop string is empty"),
        ('/set stop "a', "offmoe: the stop strings end at '\"a'"),
        ("/set greedy", "temperature=0.0"),
        ("/set --max-tokens=7", "max_tokens=7"),
        ("/set think off", "thinking: off"),
        ("/set reasoning=fold", "reasoning: fold"),
        ("/set stats short", "stats: short"),
        ("/set system be brief", "system prompt: be brief"),
        ("/set temperature nan", "offmoe: temperature is nan"),
        ("/set temperature inf", "offmoe: temperature is inf"),
        ("/set seed 1e3", "offmoe: seed is '1e3': expected a number"),
        ("/set vram 8GiB", "offmoe: /set has no option 'vram'"),
        ("/set =", "offmoe: '=' is not an option's name"),
        ("/stats loud", "offmoe: stats is 'loud': expected line, short, off"),
    ],
)
def test_options(line: str, note: str) -> None:
    assert talk(line)[1].notes[0].startswith(note)


def test_statistics_can_be_short_or_off() -> None:
    _, ui = talk("/stats short", "a", "/stats off", "b")
    assert ui.notes == ["stats: short", "1 tokens · 61.2 tok/s · context 1%", "stats: off"]


def test_an_empty_or_cut_answer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def stats(reason: str) -> Any:
        return lambda self: fake_engine.replace(fake_engine.STATS, tokens=2, finish_reason=reason)

    monkeypatch.setattr(fake_engine.Engine, "stats", stats("length"))
    assert "the answer was cut after 2 tokens: --max-tokens allows no more" in talk("a b")[1].notes
    assert "the answer is empty: all 2 tokens are reasoning" in talk("a b => ")[1].notes[-1]
    monkeypatch.setattr(fake_engine.Engine, "stats", stats("context"))
    assert talk("a")[1].notes[-1].startswith("the context is full: the answer ends here")


def test_a_full_context_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    full = fake_engine.replace(fake_engine.STATS, prompt_tokens=800)
    monkeypatch.setattr(fake_engine.Engine, "stats", lambda self: full)
    _, ui = talk("a", "b")
    warning = "the context is nearly full (803 of 1,000 tokens): /clear begins a new conversation"
    assert ui.notes.count(warning) == 1
    assert "context 80%" in ui.notes[0]
