"""Fields of a config.json, checked one by one: integers, numbers, flags, lists.

All raise OffmoeError on other values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.errors import OffmoeError

LARGEST = 2**24  # far above any dimension of a published model: a larger one means a damaged file


def count(raw: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """Return the first of `names` that is present: an integer of at least 1."""
    for name in names:
        if (value := raw.get(name)) is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
                raise OffmoeError(
                    f"the model's config gives {name} = {quote(value)}: expected a whole number of at least 1"
                )
            return value
    if default is None:
        raise OffmoeError(f"the model's config has no {' or '.join(names)}: it is incomplete or not an MoE model")
    return default


def number(raw: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number of at least 0."""
    value = raw.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise OffmoeError(f"the model's config gives {name} = {quote(value)}: expected a number of at least 0")
    return float(value)


def flag(raw: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a boolean."""
    value = raw.get(name)
    if not isinstance(value, bool | None):
        raise OffmoeError(f"the model's config gives {name} = {quote(value)}: expected true or false")
    return default if value is None else value


def text_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the language model, which multimodal models keep in a table of their own."""
    text = raw.get("text_config", {})
    if not isinstance(text, Mapping):
        raise OffmoeError("text_config in the model's config is no table")
    return {**raw, **text}


def numbers(raw: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """Return a list of numbers above 0."""
    values = raw.get(name)
    if not isinstance(values, list) or not all(type(v) in (int, float) and 0 < v < 1e12 for v in values):
        raise OffmoeError(f"the model's config gives {name} = {quote(values)}: expected a list of numbers above 0")
    return tuple(float(value) for value in values)
