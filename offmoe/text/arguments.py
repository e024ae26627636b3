"""Prompts as a program gives them: text, messages or token ids, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from offmoe.errors import OffmoeError

EXPECTED = "expected text, a list of messages or a list of token ids"


def listed(prompt: Any) -> list[Any]:
    """Return the elements of a prompt that is no text: messages or ids; an array's are numbers. Raises OffmoeError."""
    values = elements(prompt)
    if values is None:
        raise OffmoeError(f"the prompt is of type {type(prompt).__name__}: {EXPECTED}")
    return values


def elements(values: Any) -> list[Any] | None:
    """Return the elements of a sequence or an array (NumPy's, torch's); None: it is neither, or text, or bytes."""
    values = values.tolist() if hasattr(values, "tolist") else values
    known = isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray | memoryview)
    return list(values) if known else None


def token_ids(values: Iterable[Any]) -> list[int] | None:
    """Return whole numbers, of Python or NumPy, as ints; None if there is anything else among them."""
    values = list(values)
    if all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):
        return [int(value) for value in values]
    return None


def messages_of(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages as dicts, the ids of their `tokens` as ints. Raises OffmoeError for what is no message."""
    found = []
    for number, value in enumerate(values, 1):
        if not isinstance(value, Mapping):
            raise OffmoeError(f"element {number} of the prompt is of type {type(value).__name__}: {EXPECTED}")
        if not all(isinstance(key, str) for key in value):
            raise OffmoeError(f"message {number} has a key that is no text: expected role and content")
        message = dict(value)
        if "tokens" in message:
            ids = token_ids(elements(message["tokens"]) or [None])
            if ids is None:
                raise OffmoeError(f"message {number} has tokens that are not a list of token ids: leave them out")
            message["tokens"] = ids
        found.append(message)
    return found
