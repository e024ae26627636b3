"""The turns of a chat: what the model is sent, what is dropped when it is too long, how it is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.cache.files import whole_file
from offmoe.errors import OffmoeError

if TYPE_CHECKING:
    from offmoe.text.tokenizer import Message

VERSION = 1  # of the file


@dataclass
class Conversation:
    """A system prompt, and messages that alternate between user and assistant."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)

    def drop_oldest(self) -> bool:
        """Forget the oldest message and its answer; False where only the last message is left."""
        if len(self.turns) < 3:
            return False
        del self.turns[:2]
        return True

    def save(self, path: Path, model: str) -> None:
        """Write atomically, for the owner alone. `model`: where the answers' tokens are valid."""
        document = {"offmoe_chat": VERSION, "model": model, "system": self.system, "turns": self.turns}
        try:
            with whole_file(path, mode=0o600) as file:  # a talk is nobody else's business
                file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())
        except OSError as error:
            raise OffmoeError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path, model: str, vocab_size: int) -> Conversation:
        """Read and check what `save` wrote; the tokens of another model are left out, to be encoded anew."""
        try:
            if path.exists() and not path.is_file():
                raise ValueError("it is no regular file")  # a pipe would wait for ever, /dev/zero never end
            document = json.loads(path.read_bytes())
            talk = parse(document, vocab_size)
        except OSError as error:
            raise OffmoeError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise OffmoeError(f"{path} is no chat written by /save: {error}") from None
        if document["model"] != model:
            for turn in talk.turns:
                turn.pop("tokens", None)
        return talk


def parse(document: Any, vocab_size: int) -> Conversation:
    """A conversation out of a file's JSON. Raises ValueError with what is wrong."""
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
    if not isinstance(turn, dict) or turn.get("role") != role or set(turn) - {"role", "content", "reasoning", "tokens"}:
        raise ValueError(f"expected a message of role {role}, found {str(turn)[:60]!r}")
    for name in ("content", "reasoning"):
        text = turn.get(name, "" if name == "reasoning" else None)
        if not isinstance(text, str):
            raise ValueError(f"a message's {name} is no text")
        text.encode("utf-8")  # UnicodeEncodeError, a ValueError, on half a surrogate pair
    tokens = turn.get("tokens", [])
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise ValueError(f"a message's tokens are no ids below {vocab_size}")
