"""Fields of a config.json, checked one by one: integers, numbers, flags, lists.

All raise OffmoeError on other values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offmoe.checkpoint.base import quote
from offmoe.errors import OffmoeError


class FieldError(OffmoeError):
    """A field of a config that is missing or has an impossible value; the first `{}` in `text` is for its names."""

    def __init__(self, source: str, text: str, *names: str) -> None:
        super().__init__(source + text.replace("{}", " or ".join(names), 1))
        self.text, self.names = text, names

    def renamed(self, source: str, keys: Mapping[str, Any]) -> FieldError:
        """Return the error for `source`, whose own names stand in `keys` by the field's name."""
        named = (keys.get(name) for name in self.names)
        names = [key for key in named if isinstance(key, str)] or self.names
        return FieldError(source, self.text, *names)


CONFIG = "the model's config"
MISSING = " has no {}: it is incomplete or not an MoE model"
LARGEST = 2**24  # far above any dimension of a published model: a larger one means a damaged file


def count(raw: Mapping[str, Any], *names: str, default: int | None = None, least: int = 1) -> int:
    """Return the first of `names` that is present: an integer of at least `least`."""
    for name in names:
        if (value := raw.get(name)) is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
                raise FieldError(
                    CONFIG, f" gives {{}} = {quote(value)}: expected a whole number of at least {least}", name
                )
            return value
    if default is None:
        raise FieldError(CONFIG, MISSING, *names)
    return default


def number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Return a number of at least 0."""
    value = raw.get(name)
    if value is None:
        if default is None:
            raise FieldError(CONFIG, MISSING, name)
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise FieldError(CONFIG, f" gives {{}} = {quote(value)}: expected a number of at least 0", name)
    return float(value)


def flag(raw: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a boolean; null is false, as transformers takes it."""
    value = raw.get(name, default)
    if not isinstance(value, bool | None):
        raise FieldError(CONFIG, f" gives {{}} = {quote(value)}: expected true or false", name)
    return bool(value)


def text_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the language model, which multimodal models keep in a table of their own.

    As in transformers, a field of the same name next to the table does not count, except for the quantisation.
    """
    text = raw.get("text_config")
    if text is None:
        return dict(raw)
    if not isinstance(text, Mapping):
        raise OffmoeError("text_config in the model's config is no table")
    return {**{name: raw[name] for name in ("quantization_config",) if name in raw}, **text}


def numbers(raw: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """Return a list of numbers above 0."""
    values = raw.get(name)
    if not isinstance(values, list) or not all(type(v) in (int, float) and 0 < v < 1e12 for v in values):
        raise FieldError(CONFIG, f" gives {{}} = {quote(values)}: expected a list of numbers above 0", name)
    return tuple(float(value) for value in values)
