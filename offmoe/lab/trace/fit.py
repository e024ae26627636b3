"""`offmoe trace fit`: a linear map from the input of one layer's router to the logits of a later layer's router.

Ridge regression per layer on recorded states. After Zhu et al. 2025 (arXiv 2511.10676), who predict from before the
same layer's attention; here the state is known earlier, before the experts of layer l − ahead. Evaluated on held-out
sequences.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.files import whole_file
from offmoe.cache.trace import Trace

if TYPE_CHECKING:
    from rich.console import RenderableType

Floats = NDArray[np.float32]
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # a state's mean square is 1
HELD_OUT = 4  # every fourth sequence is held out
LIKELY = 0.05  # default threshold of predictors
CONTROLS = "previous token", "popularity", "map, tokens shuffled"


@dataclass(frozen=True)
class LinearMap:
    """logits of layer l ≈ states of layer l − ahead · weights[l] + bias[l]; zeros if there is no such layer."""

    weights: NDArray[np.float16]  # [layers, H, experts]
    bias: NDArray[np.float16]  # [layers, experts]
    ahead: int
    meta: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        with whole_file(path) as file:
            np.savez_compressed(
                file, weights=self.weights, bias=self.bias, ahead=self.ahead, meta=np.array(json.dumps(self.meta))
            )

    def logits(self, trace: Trace, layer: int) -> Floats:
        """Return the predicted logits of a layer, [tokens, experts]."""
        return states_of(trace, layer - self.ahead) @ self.weights[layer].astype(np.float32) + self.bias[layer]


def fit_map(trace: Trace, other: Trace | None, ahead: int, ridge: float | None) -> LinearMap:
    """Fit on `trace` and evaluate on `other`, by default on every fourth of its own sequences.

    `ridge` None: select the best on a quarter of the training sequences. Raises ValueError if there are no states, the
    models differ, or there are too few layers or sequences.
    """
    check_states(trace)
    if other:
        check_states(other)
        shape = [trace.meta[name] for name in ("layers", "experts", "top_k")]
        other.check_model(trace.meta["model"], *shape)
        if other.states is not None and states_of(other, 0).shape[1] != states_of(trace, 0).shape[1]:
            raise ValueError(
                f"states of {states_of(other, 0).shape[1]} numbers cannot evaluate a map of "
                f"{states_of(trace, 0).shape[1]}"
            )
    if ahead >= trace.meta["layers"]:
        raise ValueError(f"{ahead} layers ahead are too many: the model has {trace.meta['layers']}")
    if ridge is not None and not 0 < ridge < np.inf:
        raise ValueError(f"ridge is {ridge:g}: expected a number above 0")
    training, evaluation = (trace, other) if other else split(trace)
    if ridge is None:
        inner, rest = split(training)
        ridge = max(RIDGES, key=lambda ridge: float(np.mean(recalls(fit_layers(inner, ahead, ridge), rest))))
    linear = fit_layers(training, ahead, ridge)
    meta = {
        **{name: trace.meta[name] for name in ("model", "layers", "experts", "top_k")},
        "ahead": ahead,
        "ridge": ridge,
        "trained_on": {"tokens": len(training.experts), "sequences": training.sequences},
        "judged_on": {"tokens": len(evaluation.experts), "sequences": evaluation.sequences},
        "judged": evaluate(linear, training, evaluation),
    }
    return LinearMap(linear.weights, linear.bias, ahead, meta)


def check_states(trace: Trace) -> None:
    """Raise ValueError if the trace has no states."""
    if trace.states is None or trace.logits is None:
        raise ValueError(f"the trace of {trace.meta['model']} has no states: record it with --states")


def split(trace: Trace) -> tuple[Trace, Trace]:
    """Return training and evaluation parts of whole sequences, because tokens of one sequence are alike."""
    if trace.sequences < HELD_OUT:
        raise ValueError(
            f"{trace.sequences} sequences are too few to hold out one in {HELD_OUT}: record more, or give --test"
        )
    evaluation = [i for i in range(trace.sequences) if i % HELD_OUT == HELD_OUT - 1]
    return trace.take(sorted({*range(trace.sequences)} - {*evaluation})), trace.take(evaluation)


def fit_layers(trace: Trace, ahead: int, ridge: float) -> LinearMap:
    """Fit every layer by ridge regression."""
    layers, experts, hidden = trace.meta["layers"], trace.meta["experts"], states_of(trace, 0).shape[1]
    weights = np.zeros((layers, hidden, experts), np.float16)
    bias = np.zeros((layers, experts), np.float16)
    assert trace.logits is not None
    for layer in range(ahead, layers):
        x, y = states_of(trace, layer - ahead), trace.logits[:, layer].astype(np.float32)
        mean_x, mean_y = x.mean(0), y.mean(0)
        x -= mean_x
        w = np.linalg.solve(x.T @ x / len(x) + ridge * np.eye(hidden, dtype=np.float32), x.T @ (y - mean_y) / len(x))
        weights[layer], bias[layer] = w, mean_y - mean_x @ w
    return LinearMap(weights, bias, ahead, {})


def states_of(trace: Trace, layer: int) -> Floats:
    """Return a layer's states, [tokens, H]."""
    assert trace.states is not None
    return trace.states[:, layer].astype(np.float32)


def recalls(linear: LinearMap, trace: Trace) -> list[float]:
    """Return, for each layer, the share of routed experts that are among the map's first k."""
    return [
        recall(top(linear.logits(trace, layer), trace.meta["top_k"]), trace.experts[:, layer])
        for layer in range(linear.ahead, trace.meta["layers"])
    ]


def evaluate(linear: LinearMap, training: Trace, trace: Trace) -> dict[str, dict[str, float]]:
    """Return the figures of every predictor on `trace`: means over the layers that have a layer `ahead` before them."""
    figures: dict[str, list[dict[str, float]]] = {}
    for layer in range(linear.ahead, trace.meta["layers"]):
        for name, logits in predictors(linear, training, trace, layer).items():
            figures.setdefault(name, []).append(figures_of(logits, trace, layer))
    return {
        name: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} for name, rows in figures.items()
    }


def predictors(linear: LinearMap, training: Trace, trace: Trace, layer: int) -> dict[str, Floats]:
    """Return the logits [tokens, experts] that each predictor gives for `layer`."""
    logits = linear.logits(trace, layer)
    experts = trace.meta["experts"]
    rng = np.random.default_rng(layer)
    chosen = one_hot(trace.experts[:, layer], experts)
    uses = one_hot(training.experts[:, layer], experts).sum(0) + 1
    result = {"map": logits}
    if trace.gates is not None:
        result["gate-ahead"] = states_of(trace, layer - linear.ahead) @ trace.gates[layer].T.astype(np.float32)
    control = (
        np.roll(chosen, 1, axis=0),
        np.broadcast_to(np.log(uses / uses.sum()), logits.shape),
        rng.permutation(logits),
    )
    return result | dict(zip(CONTROLS, (np.asarray(values, np.float32) for values in control), strict=True))


def figures_of(logits: Floats, trace: Trace, layer: int) -> dict[str, float]:
    """Return recall@k, recall of experts that the previous token did not use, and precision and recall above LIKELY."""
    ids, experts = trace.experts[:, layer], trace.meta["experts"]
    chosen = one_hot(ids, experts)
    best = one_hot(top(logits, trace.meta["top_k"]), experts)
    fresh = chosen & ~np.roll(chosen, 1, axis=0)
    fresh[trace.offsets[:-1]] = False  # a sequence's first token has no previous one
    power = np.exp(logits - logits.max(1, keepdims=True))
    likely = best & (power / power.sum(1, keepdims=True) >= LIKELY)
    return {
        "recall_at_k": share(best & chosen, chosen),
        "recall_of_new": share(best & fresh, fresh),
        "precision_likely": share(likely & chosen, likely),
        "recall_likely": share(likely & chosen, chosen),
    }


def top(logits: Floats, k: int) -> NDArray[np.int64]:
    """Return the k highest, [tokens, k]; of equal ones the lowest index first."""
    return (-logits).argsort(axis=1, kind="stable")[:, :k]


def recall(best: NDArray[np.int64], ids: NDArray[Any]) -> float:
    known = ids != np.iinfo(ids.dtype).max
    return float(((ids[:, :, None] == best[:, None, :]).any(2) & known).sum() / known.sum())


def one_hot(ids: NDArray[Any], experts: int) -> NDArray[np.bool_]:
    """Return ids [tokens, k] as a mask [tokens, experts], without padding."""
    hot = np.zeros((len(ids), experts + 1), np.bool_)
    np.put_along_axis(hot, np.minimum(ids.astype(np.int64), experts), True, axis=1)
    return hot[:, :-1]


def share(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float:
    return float(part.sum() / max(1, whole.sum()))


def evaluation_table(linear: LinearMap) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    meta = linear.meta
    k = meta["top_k"]
    head = (
        f"{meta['model']}: {linear.ahead} ahead, ridge {meta['ridge']:g}, trained on {meta['trained_on']['tokens']} "
        f"tokens, judged on {meta['judged_on']['tokens']} of {meta['judged_on']['sequences']} sequences apart"
    )
    table = Table("", box=None, pad_edge=False)
    for name in (
        f"recall@{k}",
        "… of experts new since the last token",
        f"precision at p ≥ {LIKELY:g}",
        "recall there",
    ):
        table.add_column(name, justify="right")
    for name, row in meta["judged"].items():
        table.add_row(name, *(f"{value:.1%}" for value in row.values()), style="dim" if name in CONTROLS else "")
    return [Text(head, "bold"), table]
