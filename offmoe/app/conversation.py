"""Turns of a chat: the messages sent to the model, dropping the oldest of them, and the file they are saved in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.cache.files import whole_file
from offmoe.errors import OffmoeError, users_mistakes

if TYPE_CHECKING:
    from offmoe.text.messages import Message

VERSION = 1  # of the file format


@dataclass
class Conversation:
    """A system prompt, and messages that alternate between user and assistant; the last one may lack its answer."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)

    def drop_oldest(self) -> bool:
        """Drop the oldest message and its answer; return False if only the last message is left."""
        if len(self.turns) < 3:
            return False
        del self.turns[:2]
        return True

    def take_last(self) -> str:
        """Remove the last message and its answer, if it has one; return the message. Raises OffmoeError if there is
        none.
        """
        if not self.turns:
            raise OffmoeError("there is no message yet: send one first")
        last = max(index for index, turn in enumerate(self.turns) if turn["role"] == "user")
        message = self.turns[last]["content"]
        del self.turns[last:]
        return message

    def save(self, path: Path, model: str) -> None:
        """Write the file atomically, readable only by its owner. The answers' tokens are valid only for `model`."""
        document = {"offmoe_chat": VERSION, "model": model, "system": self.system, "turns": self.turns}
        with users_mistakes(), whole_file(path, mode=0o600) as file:  # conversations are private
            file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())


def load_conversation(path: Path, model: str, vocab_size: int) -> tuple[Conversation, str]:
    """Read and validate a file that `save` or a ChatStore wrote; return the conversation and its model.

    Tokens of another model than `model` are dropped: its text is encoded again.
    """
    document = read_document(path)
    try:
        conversation = parse(document, vocab_size)
    except ValueError as error:
        raise no_chat(path, error) from None
    if document["model"] != model:
        for turn in conversation.turns:
            turn.pop("tokens", None)
    return conversation, document["model"]


def read_document(path: Path) -> Any:
    """Return the JSON of a saved chat: one object, or a line for the head and one for each message.

    A last line that is not whole, because the machine stopped while it was written, is left out. Raises OffmoeError.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")  # a pipe would block for ever, /dev/zero never end
        raw = path.read_bytes()
        head, _, rest = raw.partition(b"\n")
        if not head.startswith(b'{"offmoe_chat"') or not head.endswith(b"}"):
            return json.loads(raw)
        document = json.loads(head)
        if "turns" in document:
            return json.loads(raw)
        return document | {"turns": [json.loads(line) for line in rest.split(b"\n")[:-1]]}
    except OSError as error:
        raise OffmoeError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise no_chat(path, error) from None


def no_chat(path: Path, error: Exception) -> OffmoeError:
    return OffmoeError(f"{path} is not a chat written by /save: {error}")


def parse(document: Any, vocab_size: int) -> Conversation:
    """Return the conversation in a file's JSON. Raises ValueError that says what is wrong."""
    if not isinstance(document, dict) or document.get("offmoe_chat") != VERSION:
        raise ValueError(f'expected an object with "offmoe_chat": {VERSION}')
    system, turns, model = (document.get(name) for name in ("system", "turns", "model"))
    if not (isinstance(model, str) and isinstance(system, str | None) and isinstance(turns, list)):
        raise ValueError("expected model, system and turns")
    (system or "").encode("utf-8")
    for index, turn in enumerate(turns):
        check_turn(turn, ("user", "assistant")[index % 2], vocab_size)
    return Conversation(system, turns)


def check_turn(turn: Any, role: str, vocab_size: int) -> None:
    """Raise ValueError unless `turn` is a valid message of `role`."""
    if not isinstance(turn, dict) or turn.get("role") != role or set(turn) - {"role", "content", "reasoning", "tokens"}:
        raise ValueError(f"expected a message of role {role}, found {str(turn)[:60]!r}")
    for name in ("content", "reasoning"):
        text = turn.get(name, "" if name == "reasoning" else None)
        if not isinstance(text, str):
            raise ValueError(f"a message's {name} is not text")
        text.encode("utf-8")  # UnicodeEncodeError, a ValueError, on half a surrogate pair
    tokens = turn.get("tokens", [])
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise ValueError(f"a message's tokens are not ids below {vocab_size}")
