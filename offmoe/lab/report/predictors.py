"""Predictors and their controls, replayed on recorded states with this machine's copy times."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from offmoe.cache.ahead import Pace, foresee
from offmoe.cache.trace import Trace
from offmoe.lab.live.folder import Folder, write_file
from offmoe.lab.report.markdown import markdown

SHARES = (1.0, 1.25, 1.5, 2.0, 4.0)  # thresholds, as multiples of the probability of a uniform choice
MAX_FETCHED = 8  # experts fetched per layer
GATE, GATE_2 = "gate, 1 layer ahead", "gate, 2 layers ahead"
SHUFFLED, PREVIOUS, ORACLE = "shuffled gate", "previous token", "oracle"
CONTROLS = (SHUFFLED, PREVIOUS, ORACLE)
FILE = "predictors.json"


@dataclass(frozen=True)
class Prediction:
    """Results of one predictor with one cache; None where there was nothing to evaluate."""

    family: str  # or one of CONTROLS
    name: str
    coverage: float | None  # share of the misses without prefetching that became hits
    precision: float | None  # share of the fetched experts that were used
    timely: float | None  # share of the used ones that had arrived in time
    fetched: float  # experts per token
    wasted: float  # experts per token, evicted unused
    pollution: float  # hits per token that became misses
    stall_ms: float  # per token

    @property
    def control(self) -> bool:
        return self.family in CONTROLS


@dataclass(frozen=True)
class Predictions:
    """Results of all predictors at `budget`."""

    budget: str
    policy: str
    tokens: int
    entries: tuple[Prediction, ...]


def predictor_specs(experts: int, k: int) -> list[tuple[str, str]]:
    """Return (family, spec) of all predictors, with a shuffled control for every threshold of the gate."""
    n = min(MAX_FETCHED, k)
    least = [f"{share / experts:.3g}" for share in SHARES]
    return [
        *((GATE, f"gate:d=1,p={p},n={n}") for p in least),
        *((GATE_2, f"gate:d=2,p={p},n={n}") for p in least[::2]),
        ("layer-to-layer Markov", f"markov:d=1,p={least[0]},n={n}"),
        ("nearest request", f"nearest:d=1,n={n}"),
        *((SHUFFLED, f"shuffled:gate:d=1,p={p},n={n}") for p in least),
        (PREVIOUS, f"previous:d=1,n={n}"),
        (ORACLE, f"oracle:d=1,n={n}"),
    ]


def predictions(
    trace: Trace, policy: str, slots: int, scope: str, pace: Pace, report_progress: Callable[[int, int], None]
) -> list[Prediction]:
    """Replay all predictors on `trace`, which has states; `slots` are per layer."""
    specs, found = predictor_specs(trace.meta["experts"], trace.meta["top_k"]), []
    for count, (family, spec) in enumerate(specs):
        report_progress(count, len(specs))
        outcome = foresee(trace, policy, slots, scope, spec, pace)
        seen = outcome.figures()
        per_token = {name: seen[f"{name}_per_token"] or 0.0 for name in ("fetched", "wasted", "pollution", "stall_ms")}
        found.append(
            Prediction(family, outcome.prefetch, seen["coverage"], seen["precision"], seen["timely"], **per_token)
        )
    return found


def save_predictions(folder: Folder, found: Predictions) -> None:
    """Write the results to the directory of the run."""
    write_file(folder.path / FILE, json.dumps({"run": folder.key, **asdict(found)}, indent=1))


def load_predictions(folder: Folder) -> Predictions | None:
    """Return the results of an earlier start of the same run, or None."""
    try:
        document = json.loads((folder.path / FILE).read_bytes())
        if document.pop("run") != folder.key:
            return None
        return Predictions(**{**document, "entries": tuple(Prediction(**one) for one in document["entries"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


HEADER = ("predictor", "", "coverage", "precision", "in time", "fetched", "wasted", "pollution", "stall, ms")


def paragraphs(found: Predictions | None) -> list[str]:
    """Return the paragraphs of the report's section."""
    if found is None:
        return ["No budget gives a layer more slots than one token needs: there is no room for prefetching."]
    rows = [
        [
            one.family,
            f"control, `{one.name}`" if one.control else f"`{one.name}`",
            percent(one.coverage),
            percent(one.precision),
            percent(one.timely),
            f"{one.fetched:.1f}",
            f"{one.wasted:.1f}",
            f"{one.pollution:.1f}",
            f"{one.stall_ms:.2f}",
        ]
        for one in found.entries
    ]
    return [
        f"Replayed at {found.budget} with {found.policy} on {found.tokens} tokens whose hidden states were recorded, "
        "with the copy times of this machine's link. Coverage: share of the misses without prefetching that became "
        "hits. Precision: share of the fetched experts that were used. Counts are per token; pollution: hits that "
        "prefetching turned into misses.",
        *comparison(found),
        markdown(rows, HEADER),
    ]


def comparison(found: Predictions) -> list[str]:
    """Return whether the gate predicts better than its control, threshold by threshold."""
    pairs = [
        (one, control) for one in found.entries for control in found.entries if control.name == f"shuffled:{one.name}"
    ]
    better = [one for one, control in pairs if (one.coverage or 0) > (control.coverage or 0)]
    lines = []
    if pairs:
        best, control = max(pairs, key=lambda pair: pair[0].coverage or 0)
        lines.append(
            f"The gate covers more than its shuffled control at {len(better)} of {len(pairs)} thresholds; at most "
            f"{percent(best.coverage)} against {percent(control.coverage)}."
            if better
            else "**The gate covers no more than its shuffled control: it predicts nothing here.**"
        )
    return lines


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
