"""How much a model thinks before it answers: variables that its chat template has for that, under several names."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from offmoe.errors import OffmoeError

SWITCHES = ("enable_thinking", "thinking")  # true or false
MODE = "thinking_mode"  # MiniMax-M3: enabled or disabled
EFFORTS = ("reasoning_effort", "thinking_effort", "reasoning_strength")  # a word; which ones, the template knows
WORD = re.compile(r"[a-z_]{1,32}")


def thinking_variables(value: str | None, names: Collection[str]) -> dict[str, Any]:
    """What a template with the variables `names` is to be given so that its model thinks so: on, off, or a word such
    as low, medium or high. None: nothing. Raises OffmoeError where it has no such variable."""
    if value is None:
        return {}
    switches = [name for name in SWITCHES if name in names]
    efforts = [name for name in EFFORTS if name in names]
    if not (switches or efforts or MODE in names):
        raise OffmoeError("the model's chat template has no variable for thinking: leave --think and /think out")
    if value not in ("on", "off"):
        return with_effort(value, switches, efforts)
    if not switches and MODE not in names:
        raise OffmoeError(
            f"the model's chat template takes no {value!r} for thinking, but a word: try low, medium or high"
        )
    mode = {MODE: "enabled" if value == "on" else "disabled"} if MODE in names else {}
    return dict.fromkeys(switches, value == "on") | mode


def with_effort(word: str, switches: list[str], efforts: list[str]) -> dict[str, Any]:
    if not WORD.fullmatch(word):
        raise OffmoeError(f"thinking is {word[:40]!r}: expected on, off or a word such as low, medium or high")
    if not efforts:
        raise OffmoeError(f"the model's chat template takes no {word!r} for thinking: expected on or off")
    return dict.fromkeys(switches, True) | dict.fromkeys(efforts, word)
