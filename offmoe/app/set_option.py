"""`/set`: a sampling option's name and value, as a person writes them."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from offmoe.errors import OffmoeError
from offmoe.settings import Sampling

ASSIGNMENT = re.compile(r"-{0,2}([A-Za-z][\w-]*)\s*(?:=\s*|\s+|$)(.*)", re.DOTALL)
QUOTED = re.compile(r"""\s*,?\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')""", re.DOTALL)
ESCAPE = re.compile(r"\\(.)", re.DOTALL)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
NAMES = tuple(field.name for field in fields(Sampling))


def split_assignment(text: str) -> tuple[str, str]:
    """Split `name value`, `name=value` or `--name value` into the name, with underscores, and the value, if any."""
    match = ASSIGNMENT.fullmatch(text.strip())
    if match is None:
        raise OffmoeError(f"{text.strip()!r} is not an option's name: expected {', '.join(NAMES)}")
    return match[1].replace("-", "_").lower(), match[2].strip()


def with_value(sampling: Sampling, name: str, text: str) -> Sampling:
    """Return `sampling` with the option `name` parsed from `text`. Raises OffmoeError."""
    kind = field_type(name)
    if name == "stop":
        return replace(sampling, stop=() if text == "none" else parse_strings(text))
    value: Any = None
    try:
        if text != "none":
            value = int(text) if kind.startswith("int") else float(text)
    except ValueError:
        raise OffmoeError(f"{name} is {text[:60]!r}: expected a number, or none") from None
    return replace(sampling, **{name: value})


def parse_strings(text: str) -> tuple[str, ...]:
    """Return strings in quotes, in which \\n is a new line, or the one string that `text` is without quotes."""
    if not text.startswith(("'", '"')):
        return (text,)
    strings, at = [], 0
    while at < len(text):
        match = QUOTED.match(text, at)
        if match is None:
            raise OffmoeError(f"the stop strings end at {text[at:][:40]!r}: expected strings in quotes")
        strings.append(ESCAPE.sub(lambda escape: ESCAPES.get(escape[1], escape[0]), match[1] or match[2] or ""))
        at = match.end()
    return tuple(strings)


def field_type(name: str) -> str:
    """Return the annotation of one of Sampling's fields, as written there."""
    kinds = {field.name: str(field.type) for field in fields(Sampling)}
    if name not in kinds:
        raise OffmoeError(f"/set has no option {name!r}: expected {', '.join(kinds)}")
    return kinds[name]
