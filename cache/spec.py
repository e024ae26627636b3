"""Parameters after a name, as a user writes them: `h=64,profile=FILE`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from offmoe.cache.policies.base import File, Parameter, Setting, Share

NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
Settings = Mapping[str, Setting]


def read(
    what: str, spec: str, head: str, mark: str, rest: str | None, settings: Settings
) -> tuple[str, dict[str, Any]]:
    """The canonical spec and the values of all `settings`; ValueError, one line, for what is not allowed.

    what: "policy" or "prefetch"; spec = head + mark + rest, or head alone where rest is None.
    """
    write = usage(head, settings, mark)
    given = [] if rest is None else [pair.partition("=") for pair in rest.split(",")]
    values: dict[str, Any] = {}
    for key, _, text in given:
        if key not in settings:
            raise ValueError(f"{what} {spec!r} has no parameter {key!r}: write {write}")
        if key in values:
            raise ValueError(f"{what} {spec!r} sets a parameter twice: write {write}")
        values[key] = parse(settings[key], text)
        if values[key] is None:
            raise ValueError(f"{what} {spec!r}: {key} is {text!r}: write {write}")
    values = {key: values.get(key, setting.default) for key, setting in settings.items()}
    shown = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
             if value != ""]  # fmt: skip
    return head + (mark if shown else "") + ",".join(shown), values


def parse(setting: Setting, text: str) -> int | float | str | None:
    """None: not allowed."""
    if isinstance(setting, File):
        return text or None
    if not NUMBER.fullmatch(text):
        return None
    if isinstance(setting, Share):
        return float(text) if float(text) <= 1 else None
    return int(text) if text.isdecimal() and setting.low <= int(text) <= setting.high else None


def usage(name: str, settings: Settings, mark: str = ":") -> str:
    """How to write it, with its ranges: `crf:h=1…4096`."""
    return name + (mark if settings else "") + ",".join(f"{key}={span(setting)}" for key, setting in settings.items())


def span(setting: Setting) -> str:
    if isinstance(setting, Parameter):
        return f"{setting.low}…{setting.high}"
    return "0…1" if isinstance(setting, Share) else "FILE"
