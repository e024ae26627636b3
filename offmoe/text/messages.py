"""Messages of a conversation, and checks of what a caller gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from offmoe.errors import OffmoeError

MESSAGE_KEYS = {"role", "content", "reasoning", "tokens"}
ROLE = re.compile(r"[\w.-]{1,40}")  # templates print it between their marks


class Message(TypedDict):
    """One turn of a conversation.

    `reasoning` is the model's thinking before `content`; the template decides what becomes of it. `tokens` are the ids
    that the model generated for `content`, and are used verbatim.
    """

    role: str
    content: str
    reasoning: NotRequired[str]
    tokens: NotRequired[Sequence[int]]


def continues_answer(prompt: object) -> bool:
    """Return whether `prompt` is a conversation that ends with the start of the assistant's answer."""
    last = prompt[-1] if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt else None
    return isinstance(last, Mapping) and last.get("role") == "assistant" and bool(str(last.get("content", "")).strip())


def text_messages(messages: Sequence[Message]) -> list[Message]:
    """Return the messages, checked; a content given as a list of text parts is one text."""
    joined: list[Message] = [{**message, "content": joined_parts(message.get("content"))} for message in messages]
    check_messages(joined)
    return joined


def joined_parts(content: Any) -> Any:
    """Return the text of a list of parts `{"type": "text", "text": …}`; any other content unchanged."""
    if not isinstance(content, list) or not all(
        isinstance(part, dict) and part.keys() == {"type", "text"} for part in content
    ):
        return content
    texts = [part["text"] for part in content if part["type"] == "text" and isinstance(part["text"], str)]
    return "".join(texts) if texts and len(texts) == len(content) else content


def check_messages(messages: Sequence[Message]) -> None:
    """Raise OffmoeError unless roles, contents and reasoning are strings: images and tools are not supported."""
    for i, message in enumerate(messages, start=1):
        if unknown := message.keys() - MESSAGE_KEYS:
            raise OffmoeError(
                f"message {i} has {sorted(unknown)[0]!r}: expected role and content; images and tools are not supported"
            )
        if message.get("role") == "tool":
            raise OffmoeError(
                f"message {i} has the role 'tool': expected user or assistant; images and tools are not supported"
            )
        for key in ("role", "content", "reasoning"):
            value = message.get(key, "" if key == "reasoning" else None)
            if not isinstance(value, str):
                kind = type(value).__name__
                raise OffmoeError(
                    f"message {i} has a {key} of type {kind}: expected text; images and tools are not supported"
                )
            check_unicode(value)
        if not ROLE.fullmatch(message["role"]):
            raise OffmoeError(f"message {i} has the role {message['role'][:40]!r}: expected a word, such as user")


def check_unicode(text: str) -> None:
    """Raise OffmoeError if `text` has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OffmoeError(
            f"the text has a lone surrogate (character {error.start}), which is not valid Unicode: remove it"
        ) from None
