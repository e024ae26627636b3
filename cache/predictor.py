"""From what a person writes, `markov:p=0.1,n=2`, to a predictor."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from offmoe.cache.plugin import PluginError, built, failing_in, is_plugin, load_plugin
from offmoe.cache.policies.base import File, Ints, Parameter
from offmoe.cache.predictors import PREDICTORS
from offmoe.cache.predictors.base import Predictor, Setting, Share, Shares
from offmoe.cache.predictors.shuffled import Shuffled
from offmoe.cache.trace import Trace

NONE, SHUFFLED = "none", "shuffled"
NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def make_predictor(spec: str, trace: Trace) -> Predictor | None:
    """The predictor that `spec` names (`none`: None), over `trace`; ValueError if there is none."""
    if spec == NONE:
        return None
    head, colon, rest = spec.partition(":")
    if head == SHUFFLED:
        inner = make_predictor(rest, trace) if colon else None
        if inner is None:
            raise ValueError(f"prefetch {spec!r} shuffles nothing: write for example shuffled:gate:d=1,n=2")
        return Shuffled(inner, f"{SHUFFLED}:{inner.name}")
    if is_plugin(spec):
        kind, head, given = load_plugin(spec, Predictor)  # type: ignore[type-abstract]
        name, values = understand(spec, head, kind, given, ",")
        return built(lambda: checked(kind)(trace, name, **values), name)
    if head not in PREDICTORS:
        known = [usage(name, kind) for name, kind in PREDICTORS.items()]
        raise ValueError(f"prefetch {spec!r} is unknown: choose {', '.join((NONE, *known, 'shuffled:…'))}")
    name, values = understand(spec, head, PREDICTORS[head], rest if colon else None, ":")
    return PREDICTORS[head](trace, name, **values)


def understand(spec: str, head: str, kind: type[Predictor], rest: str | None, mark: str) -> tuple[str, dict[str, Any]]:
    """The canonical spec and the values of its parameters."""
    write = usage(head, kind, mark)
    given = [] if rest is None else [pair.partition("=") for pair in rest.split(",")]
    values = {}
    for key, _, text in given:
        if key not in kind.parameters or key in values:
            raise ValueError(f"prefetch {spec!r}: {key!r} is unknown or given twice: write {write}")
        values[key] = number(kind.parameters[key], text)
        if values[key] is None:
            raise ValueError(f"prefetch {spec!r}: {key} is {text!r}: write {write}")
    full = {key: values.get(key, getattr(limit, "default", "")) for key, limit in kind.parameters.items()}
    shown = ",".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in full.items()
                     if value != "")  # fmt: skip
    return head + (mark if shown else "") + shown, {key: value for key, value in full.items() if value is not None}


def number(limit: Setting, text: str) -> int | float | str | None:
    """What is written, or None where it is not allowed."""
    if isinstance(limit, File):
        return text or None
    if not NUMBER.fullmatch(text):
        return None
    if isinstance(limit, Share):
        return float(text) if float(text) <= 1 else None
    return int(text) if text.isdecimal() and limit.low <= int(text) <= limit.high else None


def usage(name: str, kind: type[Predictor], mark: str = ":") -> str:
    """`gate:d=1…4,p=0…1,n=1…64`."""

    def span(limit: Setting) -> str:
        if isinstance(limit, Parameter):
            return f"{limit.low}…{limit.high}"
        return "0…1" if isinstance(limit, Share) else "FILE"

    return name + mark + ",".join(f"{key}={span(limit)}" for key, limit in kind.parameters.items())


class Guard(Predictor):
    """Comes before a plug-in's class, and looks at what it answers."""

    def seen(self, token: int, layer: int, experts: Ints) -> None:
        with failing_in(f"{self.name}: seen()"):
            super().seen(token, layer, experts)

    def predict(self, token: int, layer: int) -> tuple[Ints, Shares]:
        with failing_in(f"{self.name}: predict()"):
            experts, likely = super().predict(token, layer)  # type: ignore[safe-super]
            experts, likely = np.asarray(experts), np.asarray(likely, np.float64)
        where = f"plug-in {self.name}: predict() for layer {layer} of token {token}"
        if experts.ndim != 1 or experts.shape != likely.shape:
            raise PluginError(f"{where} gave experts {list(experts.shape)} and confidences {list(likely.shape)}")
        if len(experts) and experts.dtype.kind not in "iu":
            raise PluginError(f"{where} gave experts of {experts.dtype}: expected whole numbers")
        total = self.trace.meta["experts"]
        if len(np.unique(experts)) < len(experts) or ((experts < 0) | (experts >= total)).any():
            raise PluginError(f"{where} gave an expert twice, or one that is not of 0 to {total - 1}")
        if np.isnan(likely).any():
            raise PluginError(f"{where} gave NaN")
        return experts.astype(np.int64), likely


def checked(kind: type[Predictor]) -> type[Predictor]:
    """The class with a guard before it."""
    return type(kind.__name__, (Guard, kind), {})
