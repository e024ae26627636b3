"""Turns of a chat: the messages sent to the model, dropping the oldest of them, and the file they are saved in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.cache.files import whole_file
from offmoe.errors import OffmoeError, users_mistakes

if TYPE_CHECKING:
    from offmoe.text.tokenizer import Message

VERSION = 1  # of the file format


@dataclass
class Conversation:
    """A system prompt, and messages that alternate between user and assistant."""

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

    def save(self, path: Path, model: str) -> None:
        """Write the file atomically, readable only by its owner. The answers' tokens are valid only for `model`."""
        document = {"offmoe_chat": VERSION, "model": model, "system": self.system, "turns": self.turns}
        with users_mistakes(), whole_file(path, mode=0o600) as file:  # conversations are private
            file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, path: Path, model: str, vocab_size: int) -> Conversation:
        """Read and validate a file that `save` wrote.

        Tokens of another model are dropped: its text is encoded again.
        """
        try:
            if path.exists() and not path.is_file():
                raise ValueError("it is not a regular file")  # a pipe would block for ever, /dev/zero never end
            document = json.loads(path.read_bytes())
            conversation = parse(document, vocab_size)
        except OSError as error:
            raise OffmoeError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise OffmoeError(f"{path} is not a chat written by /save: {error}") from None
        if document["model"] != model:
            for turn in conversation.turns:
                turn.pop("tokens", None)
        return conversation


def parse(document: Any, vocab_size: int) -> Conversation:
    """Return the conversation in a file's JSON. Raises ValueError that says what is wrong."""
    if not isinstance(document, dict) or document.get("offmoe_chat") != VERSION:
        raise ValueError(f'expected an object with "offmoe_chat": {VERSION}')
    system, turns, model = (document.get(name) for name in ("system", "turns", "model"))
    if not (isinstance(model, str) and isinstance(system, str | None) and isinstance(turns, list)):
        raise ValueError("expected model, system and turns")
    if len(turns) % 2:
        raise ValueError("its last message has no answer")
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
