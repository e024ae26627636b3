"""Chats kept under the user's state directory: one file of JSON lines each, whose first line is its head."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.app.conversation import VERSION, Conversation, read_document
from offmoe.app.user_folders import open_state_folder
from offmoe.cache.files import whole_file
from offmoe.errors import OffmoeError

if TYPE_CHECKING:
    from offmoe.text.messages import Message

SUFFIX = ".jsonl"


class ChatStore:
    """Keeps a conversation in a file: messages are appended as they come; anything else rewrites the file."""

    def __init__(self, folder: Path, model: str) -> None:
        self.path: Path | None = None  # None until the chat has a message
        self.folder, self._model = folder, model
        self._written: list[Message] | None = None  # None: the file is to be written anew
        self._system: str | None = None
        self._stamp: tuple[int, int] | None = None  # inode and size that the last write left

    def begin(self, path: Path | None = None) -> None:
        """Begin a new chat, or go on with the one in `path`."""
        self.path, self._written = path, None
        self._stamp = stamp(path) if path else None

    def sync(self, conversation: Conversation) -> None:
        """Bring the file up to date. Raises OSError or ValueError if that is impossible."""
        if self.path is None and not conversation.turns:
            return
        turns, known = conversation.turns, self._written
        if self.path is None or stamp(self.path) != self._stamp:  # another offmoe goes on with the same chat
            self.path, known = new_file(self.folder), None
        if known is not None and turns[: len(known)] == known and conversation.system == self._system:
            append(self.path, turns[len(known) :])
        else:
            head = {"offmoe_chat": VERSION, "model": self._model, "system": conversation.system}
            with whole_file(self.path, mode=0o600) as file:  # chats are private
                file.write(b"".join(map(json_line, (head, *turns))))
        self._written, self._system, self._stamp = list(turns), conversation.system, stamp(self.path)


@dataclass(frozen=True)
class KeptChat:
    """A kept chat, as `--list` displays it."""

    path: Path
    model: str
    messages: int
    first: str  # message

    @property
    def name(self) -> str:
        return self.path.stem


def chats_directory() -> Path:
    """Return the directory of all kept chats. Raises OffmoeError if there can be none."""
    return open_state_folder("chats")


def kept_chats() -> Iterator[KeptChat]:
    """Yield the kept chats, the one continued last first. Damaged files are skipped. Raises OffmoeError."""
    files = [path for path in chats_directory().glob(f"*{SUFFIX}") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            document = read_document(path)
            turns, model = document["turns"], str(document["model"])
            yield KeptChat(path, model, len(turns), str(turns[0]["content"]) if turns else "")
        except (OffmoeError, LookupError, TypeError):
            continue


def last_chat() -> KeptChat:
    """Return the chat continued last. Raises OffmoeError if there is none."""
    chat = next(kept_chats(), None)
    if chat is None:
        raise OffmoeError("there is no chat to continue yet: start one with `offmoe chat`")
    return chat


def find_chat(name: str) -> Path:
    """Return the file of a kept chat by its name, or the path that `name` is."""
    if os.sep not in name and not Path(name).exists():
        try:
            kept = chats_directory() / f"{name.removesuffix(SUFFIX)}{SUFFIX}"
            if kept.is_file():
                return kept
        except OffmoeError:
            pass  # no chats are kept
    return Path(os.path.expanduser(name))


def new_file(folder: Path) -> Path:
    """Create an empty file that is named after the time; return its path."""
    base = time.strftime("%Y-%m-%d-%H%M%S")
    for name in (base, *(f"{base}-{number}" for number in range(2, 1000))):
        path = folder / f"{name}{SUFFIX}"
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            continue
        return path
    raise FileExistsError(None, "too many chats begin in this second", str(folder))


def append(path: Path, turns: list[Message]) -> None:
    """Append messages to a file and wait until they are on the disk."""
    if not turns:
        return
    with path.open("ab") as file:
        file.write(b"".join(map(json_line, turns)))
        file.flush()
        os.fsync(file.fileno())


def json_line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when another process writes the file: its inode and size; None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size
