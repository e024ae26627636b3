"""Predictors beside their controls, replayed on states that were recorded for it, at this machine's pace."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from offmoe.cache.ahead import Pace, foresee
from offmoe.cache.trace import Trace
from offmoe.lab.live.folder import Folder, write_file
from offmoe.lab.report.markdown import markdown

SHARES = (1.0, 1.25, 1.5, 2.0, 4.0)  # least probabilities, as multiples of an even choice among all experts
MOST = 8  # records fetched for a layer
GATE, GATE_2 = "gate, 1 layer ahead", "gate, 2 layers ahead"
SHUFFLED, PREVIOUS, ORACLE = "shuffled gate", "previous token", "oracle"
CONTROLS = (SHUFFLED, PREVIOUS, ORACLE)
FILE = "predictors.json"


@dataclass(frozen=True)
class Prediction:
    """How well a predictor does at one cache; None where there was nothing to judge."""

    family: str  # or one of CONTROLS
    name: str
    coverage: float | None  # of the misses without prefetching, those that are hits now
    precision: float | None  # of the records fetched, those that were asked for
    timely: float | None  # of these, those that had arrived
    fetched: float  # a token
    wasted: float  # a token, evicted unused
    pollution: float  # a token, hits that became misses
    stall_ms: float  # a token

    @property
    def control(self) -> bool:
        return self.family in CONTROLS


@dataclass(frozen=True)
class Predictions:
    """What was replayed at `budget`."""

    budget: str
    policy: str
    tokens: int
    of: tuple[Prediction, ...]


def asked(experts: int, k: int) -> list[tuple[str, str]]:
    """Family and spec of what is replayed; a shuffled control for every threshold of the gate."""
    n = min(MOST, k)
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
    trace: Trace, policy: str, slots: int, scope: str, pace: Pace, done: Callable[[int, int], None]
) -> list[Prediction]:
    """`trace` has states; slots: a layer."""
    specs, found = asked(trace.meta["experts"], trace.meta["top_k"]), []
    for count, (family, spec) in enumerate(specs):
        done(count, len(specs))
        outcome = foresee(trace, policy, slots, scope, spec, pace)
        seen = outcome.figures()
        a_token = {name: seen[f"{name}_per_token"] or 0.0 for name in ("fetched", "wasted", "pollution", "stall_ms")}
        found.append(
            Prediction(family, outcome.prefetch, seen["coverage"], seen["precision"], seen["timely"], **a_token)
        )
    return found


def keep(folder: Folder, found: Predictions) -> None:
    write_file(folder.path / FILE, json.dumps({"run": folder.key, **asdict(found)}, indent=1))


def kept(folder: Folder) -> Predictions | None:
    """What an earlier start of the same run replayed."""
    try:
        document = json.loads((folder.path / FILE).read_bytes())
        if document.pop("run") != folder.key:
            return None
        return Predictions(**{**document, "of": tuple(Prediction(**one) for one in document["of"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


HEADER = ("predictor", "", "coverage", "precision", "in time", "fetched", "wasted", "pollution", "stall, ms")


def paragraphs(found: Predictions | None) -> list[str]:
    """The report's section."""
    if found is None:
        return ["No budget leaves a layer more slots than one token needs: there is no room to fetch ahead."]
    rows = [
        [
            one.family, f"control, `{one.name}`" if one.control else f"`{one.name}`", percent(one.coverage),
            percent(one.precision), percent(one.timely), f"{one.fetched:.1f}", f"{one.wasted:.1f}",
            f"{one.pollution:.1f}", f"{one.stall_ms:.2f}",
        ]
        for one in found.of
    ]  # fmt: skip
    return [
        f"Replayed at {found.budget} with {found.policy} on {found.tokens} tokens whose hidden states were recorded, "
        "copies taking as long as this machine's link needs. Coverage: of the misses without prefetching, those that "
        "became hits. Precision: of the records fetched, those that were asked for. Numbers are a token's; pollution "
        "are hits that fetching turned into misses.",
        *judged(found),
        markdown(rows, HEADER),
    ]


def judged(found: Predictions) -> list[str]:
    """Whether the gate knows more than its control, threshold by threshold."""
    pairs = [(one, control) for one in found.of for control in found.of if control.name == f"shuffled:{one.name}"]
    better = [one for one, control in pairs if (one.coverage or 0) > (control.coverage or 0)]
    lines = []
    if pairs:
        best, control = max(pairs, key=lambda pair: pair[0].coverage or 0)
        lines.append(
            f"The gate covers more than its shuffled control at {len(better)} of {len(pairs)} thresholds; at most "
            f"{percent(best.coverage)} against {percent(control.coverage)}."
            if better
            else "**The gate covers no more than its shuffled control: it knows nothing here.**"
        )
    return lines


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
