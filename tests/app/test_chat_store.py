"""Kept chats: every message is in the file as soon as it is sent, nothing is lost, and nothing of it is fatal."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from offmoe.app.chat_store import ChatStore, find_chat, kept_chats, last_chat
from offmoe.app.conversation import Conversation, load_conversation
from offmoe.errors import OffmoeError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directory of the kept chats."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    chats = tmp_path / "offmoe/chats"
    chats.mkdir(parents=True)
    return chats


def said(*texts: str) -> Conversation:
    """Return a conversation of these messages."""
    roles = ("user", "assistant")
    return Conversation(None, [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)])


def test_messages_are_appended_as_they_come(folder: Path) -> None:
    store = ChatStore(folder, "model")
    store.sync(said())
    assert list(folder.iterdir()) == []
    store.sync(said("a"))
    assert store.path is not None
    inode = store.path.stat().st_ino
    store.sync(said("a", "b"))
    store.sync(said("a", "b", "Größe\n"))
    assert store.path.stat().st_ino == inode
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert load_conversation(store.path, "model", 10) == (said("a", "b", "Größe\n"), "model")


def test_changes_rewrite_the_file(folder: Path) -> None:
    store = ChatStore(folder, "model")
    store.sync(said("a", "b", "c", "d"))
    assert store.path is not None
    for changed in (said("a", "b"), said("x", "y"), Conversation("brief", said("x", "y").turns), said()):
        store.sync(changed)
        assert load_conversation(store.path, "model", 10)[0] == changed
    assert list(folder.iterdir()) == [store.path]


def test_a_chat_goes_on_in_its_file_unless_another_program_does_so(folder: Path) -> None:
    first, second = ChatStore(folder, "model"), ChatStore(folder, "model")
    first.sync(said("a", "b"))
    second.begin(first.path)
    second.sync(said("a", "b", "c"))
    assert second.path == first.path
    first.sync(said("a", "b", "other"))
    assert second.path != first.path
    assert first.path is not None
    assert load_conversation(first.path, "model", 10)[0] == said("a", "b", "other")
    assert second.path is not None
    assert load_conversation(second.path, "model", 10)[0] == said("a", "b", "c")


def test_a_line_that_was_cut_is_left_out(folder: Path) -> None:
    store = ChatStore(folder, "model")
    store.sync(said("a", "b", "c"))
    assert store.path is not None
    whole = store.path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        store.path.write_bytes(whole[:length])
        turns = load_conversation(store.path, "model", 10)[0].turns
        assert turns == said("a", "b", "c").turns[: len(turns)]
    again = ChatStore(folder, "model")
    again.begin(store.path)
    again.sync(said("a", "b", "d"))
    assert load_conversation(store.path, "model", 10)[0] == said("a", "b", "d")


def test_the_list_has_the_last_chat_first_and_skips_what_is_damaged(folder: Path) -> None:
    for number, text in enumerate(("old", "new")):
        store = ChatStore(folder, "/models/model.gguf")
        store.sync(said(text, "answer"))
        assert store.path is not None
        os.utime(store.path, (number, number))
    for name, content in (("empty", ""), ("text", "hi"), ("list", "[]"), ("head", '{"offmoe_chat": 1}\n{"a": 1}\n')):
        (folder / f"{name}.jsonl").write_text(content)
    assert [(chat.first, chat.messages) for chat in kept_chats()] == [("new", 2), ("old", 2)]
    assert last_chat().first == "new"
    assert find_chat(last_chat().name) == last_chat().path
    assert find_chat("nothing") == Path("nothing")


def test_without_a_chat_there_is_none_to_continue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OffmoeError, match="there is no chat to continue yet"):
        last_chat()
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    with pytest.raises(OffmoeError, match="/dev/null/offmoe/chats: Not a directory"):
        last_chat()


def test_tokens_are_kept_for_the_same_model_only(folder: Path) -> None:
    store = ChatStore(folder, "model")
    conversation = said("a", "b")
    conversation.turns[1]["tokens"] = [1, 2]
    store.sync(conversation)
    assert store.path is not None
    assert load_conversation(store.path, "model", 10)[0] == conversation
    assert load_conversation(store.path, "other", 10)[0] == said("a", "b")
    assert json.loads(store.path.read_text().splitlines()[0])["model"] == "model"
