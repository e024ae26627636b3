"""Template variables that turn a model's thinking on or off or set its effort; families name them differently."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from offmoe.errors import OffmoeError

SWITCHES = ("enable_thinking", "thinking")  # true or false
MODE = "thinking_mode"  # MiniMax-M3: "enabled" or "disabled"
EFFORTS = ("reasoning_effort", "thinking_effort", "reasoning_strength")  # a word; the template defines which
WORD = re.compile(r"[a-z_]{1,32}")


def thinking_variables(value: str | None, names: Collection[str]) -> dict[str, Any]:
    """Return the template variables for `value`: "on", "off" or an effort such as "low", "medium" or "high".

    `names` are the variables that the template reads. Return {} for None. Raises OffmoeError if the template has no
    variable for `value`.
    """
    if value is None:
        return {}
    switches = [name for name in SWITCHES if name in names]
    efforts = [name for name in EFFORTS if name in names]
    if not (switches or efforts or MODE in names):
        raise OffmoeError("the model's chat template has no variable for thinking: omit --think and /think")
    if value not in ("on", "off"):
        return effort_variables(value, switches, efforts)
    if not switches and MODE not in names:
        raise OffmoeError(
            f"the model's chat template does not accept {value!r} for thinking: try a word such as low, medium or high"
        )
    mode = {MODE: "enabled" if value == "on" else "disabled"} if MODE in names else {}
    return dict.fromkeys(switches, value == "on") | mode


def effort_variables(word: str, switches: list[str], efforts: list[str]) -> dict[str, Any]:
    """Return the variables that turn thinking on with the effort `word`."""
    if not WORD.fullmatch(word):
        raise OffmoeError(f"thinking is {word[:40]!r}: expected on, off or a word such as low, medium or high")
    if not efforts:
        raise OffmoeError(f"the model's chat template does not accept {word!r} for thinking: expected on or off")
    return dict.fromkeys(switches, True) | dict.fromkeys(efforts, word)
