"""From what a person writes, `markov:p=0.1,n=2`, to a predictor."""

from __future__ import annotations

import numpy as np

from offmoe.cache.arrays import Ints
from offmoe.cache.plugin import PluginError, built, failing_in, is_plugin, load_plugin, read_only
from offmoe.cache.predictors import PREDICTORS
from offmoe.cache.predictors.base import Predictor, Shares
from offmoe.cache.predictors.shuffled import Shuffled
from offmoe.cache.spec import read, usage
from offmoe.cache.trace import Trace

NONE, SHUFFLED = "none", "shuffled"


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
        name, values = read("prefetch", spec, head, ",", given, kind.parameters)
        return built(lambda: checked(kind)(trace, name, **values), name)
    if head not in PREDICTORS:
        known = [usage(name, kind.parameters) for name, kind in PREDICTORS.items()]
        raise ValueError(f"prefetch {spec!r} is unknown: choose {', '.join((NONE, *known, 'shuffled:…'))}")
    name, values = read("prefetch", spec, head, ":", rest if colon else None, PREDICTORS[head].parameters)
    return PREDICTORS[head](trace, name, **values)


class Guard(Predictor):
    """Comes before a plug-in's class, and looks at what it answers."""

    def seen(self, token: int, layer: int, experts: Ints) -> None:
        with failing_in(f"{self.name}: seen()"):
            super().seen(token, layer, read_only(experts))

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
        if not np.isfinite(likely).all():
            raise PluginError(f"{where} gave {likely[~np.isfinite(likely)][0]}: expected confidences from 0 to 1")
        return experts.astype(np.int64), likely


def checked(kind: type[Predictor]) -> type[Predictor]:
    """The class with a guard before it."""
    return type(kind.__name__, (Guard, kind), {})
