"""Statistics of a trace: how uneven the load is, how stable the routing, and whether experts specialise."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.trace import Trace

Array = NDArray[np.float64]
LAGS = (1, 2, 4, 8, 16, 32)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHUFFLES = 8  # repetitions of the control; its mean over 30 layers is then accurate to about 1 %
POSITIONS = (4, 16, 64)
MIN_USES = 20  # an expert with fewer uses is not called a specialist


@dataclass(frozen=True)
class Classification:
    """A division of the tokens into classes, and the information of experts about them, in bits per routed expert."""

    name: str
    labels: list[str]
    shares: Array  # [classes] of the tokens
    information: Array  # [layers] mutual information of class and expert
    control: Array  # [layers] the same with the classes shuffled: the bias of a finite sample
    lift: Array  # [layers, experts, classes] P(class | expert) ÷ P(class); 1: indifferent or rarely used

    @property
    def entropy(self) -> float:
        """Entropy of the classes, bits: the upper bound of the information."""
        shares = self.shares[self.shares > 0]
        return float(-(shares * np.log2(shares)).sum())

    @property
    def known(self) -> Array:
        """Information beyond chance as a share of the entropy, [layers]."""
        beyond = self.information - self.control
        return beyond / self.entropy if self.entropy else np.zeros_like(beyond)

    def specialist(self, label: str) -> tuple[int, int, float]:
        """Return layer, expert and lift of the expert most specialised in `label`."""
        lifts = self.lift[..., self.labels.index(label)]
        layer, expert = np.unravel_index(int(lifts.argmax()), lifts.shape)
        return int(layer), int(expert), float(lifts.max())


@dataclass(frozen=True)
class Facts:
    """Statistics of the decoded tokens."""

    meta: dict[str, Any]
    tokens: int
    prompt_tokens: int
    sequences: int
    load: Array  # [layers, experts] uses ÷ uses at an even load
    entropy: Array  # [layers] entropy of the load ÷ its maximum
    hottest: Array  # [layers] share of the uses by the hottest quarter of the experts
    dead: NDArray[np.int64]  # [layers] number of experts never used
    reuse: Array  # [LAGS, layers] share of a token's experts that the token LAG later uses too
    popular: Array  # [layers] the same for two random tokens: reuse by popularity alone
    working: Array  # [WINDOWS, layers] distinct experts in a window; NaN if no sequence is as long
    classifications: list[Classification]

    @property
    def uniform(self) -> float:
        """Reuse of a router that chooses at random."""
        return float(self.meta["top_k"] / self.meta["experts"])


def examine(trace: Trace) -> Facts:
    """Return the statistics of a trace."""
    layers, experts = trace.meta["layers"], trace.meta["experts"]
    divisions = list(classes(trace))
    layer_facts = [Layer.of(trace, layer, divisions) for layer in range(layers)]
    load = np.stack([layer.uses for layer in layer_facts]).astype(float)
    ordered = -np.sort(-load, axis=1)
    return Facts(
        meta={name: trace.meta[name] for name in ("model", "layers", "experts", "top_k")},
        tokens=len(trace.experts),
        prompt_tokens=0 if trace.prefill is None else len(trace.prefill),
        sequences=trace.sequences,
        load=load / load.sum(1, keepdims=True) * experts,
        entropy=np.array([bits(row) for row in load]) / max(np.log2(experts), 1e-9),
        hottest=ordered[:, : -(-experts // 4)].sum(1) / load.sum(1),
        dead=(load == 0).sum(1),
        reuse=np.stack([layer.reuse for layer in layer_facts], axis=1),
        popular=np.array([layer.popular for layer in layer_facts]),
        working=np.stack([layer.working for layer in layer_facts], axis=1),
        classifications=[
            Classification(
                name,
                labels,
                np.bincount(class_of, minlength=len(labels)) / len(class_of),
                np.array([layer.information[i][0] for layer in layer_facts]),
                np.array([layer.information[i][1] for layer in layer_facts]),
                np.stack([layer.lifts[i] for layer in layer_facts]),
            )
            for i, (name, labels, class_of, _) in enumerate(divisions)
        ],
    )


Division = tuple[str, list[str], NDArray[np.int64], NDArray[np.int64]]  # name, labels, class and block of every token


def classes(trace: Trace) -> Iterator[Division]:
    """Yield the divisions of the tokens. Blocks (tokens, or whole sequences) are what the control shuffles."""
    each = np.arange(len(trace.experts))
    sequence = np.repeat(np.arange(trace.sequences), np.diff(trace.offsets))
    position = each - trace.offsets[sequence]
    labels = [f"{low}–{high - 1}" for low, high in zip((0, *POSITIONS), POSITIONS, strict=False)]
    yield "position", [*labels, f"{POSITIONS[-1]}–"], np.searchsorted(POSITIONS, position, side="right"), each
    pieces = trace.meta.get("pieces")
    if trace.tokens is not None and isinstance(pieces, dict) and pieces:
        kinds = [token_kind(str(pieces.get(str(token), ""))) for token in trace.tokens.tolist()]
        yield "token", *number_names(kinds), each
    names = trace.meta.get("classes", [])
    if len(set(names)) > 1:
        found, class_of = number_names(names)
        yield "prompt", found, class_of[sequence], sequence


def number_names(names: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct names, most common first, and the number of each name."""
    found = sorted(set(names), key=lambda name: (-names.count(name), name))
    number = {name: i for i, name in enumerate(found)}
    return [name or "(none)" for name in found], np.array([number[name] for name in names], np.int64)


def token_kind(piece: str) -> str:
    """Return the class of a token by its text."""
    text = piece.strip()
    if not text:
        return "newline" if "\n" in piece else "space" if piece else "special"
    kinds = {unicodedata.category(letter)[0] for letter in text}
    if kinds <= {"N"}:
        return "digits"
    if not kinds & {"L", "N"}:
        return "punctuation"
    if not text.isascii():
        return "other script"
    return "word" if piece[0].isspace() else "inside a word"


@dataclass(frozen=True)
class Layer:
    """Statistics of one layer."""

    uses: NDArray[np.int64]  # [experts]
    reuse: Array  # [LAGS]
    popular: float
    working: Array  # [WINDOWS]
    information: list[tuple[float, float]]  # one per division: (actual, shuffled)
    lifts: list[Array]  # one per division: [experts, classes]

    @classmethod
    def of(cls, trace: Trace, layer: int, divisions: list[Division]) -> Layer:
        """Compute the statistics of one layer."""
        used = usage_mask(trace, layer)  # [tokens, experts]
        uses = used.sum(0, dtype=np.int64)
        starts = np.repeat(trace.offsets[:-1], np.diff(trace.offsets))  # [tokens] of the token's sequence
        joint = [class_counts(used, class_of, len(labels)) for _, labels, class_of, _ in divisions]
        return cls(
            uses=uses,
            reuse=np.array([reuse_at(used, starts, lag) for lag in LAGS]),
            popular=float((uses / len(used)) @ uses / uses.sum()),
            working=working_sets(used, starts),
            information=[
                (information(joint[i]), shuffled_information(used, class_of, block, len(labels), seed=layer))
                for i, (_, labels, class_of, block) in enumerate(divisions)
            ],
            lifts=[lift(table) for table in joint],
        )


def usage_mask(trace: Trace, layer: int) -> NDArray[np.bool_]:
    """Return whether each token used each expert, [tokens, experts]."""
    ids = trace.experts[:, layer].astype(np.int64)
    used = np.zeros((len(ids), trace.meta["experts"] + 1), np.bool_)
    np.put_along_axis(used, np.minimum(ids, trace.meta["experts"]), True, axis=1)
    return used[:, :-1]  # the last column is the padding


def reuse_at(used: NDArray[np.bool_], starts: NDArray[Any], lag: int) -> float:
    """Return the share of a token's experts that the token `lag` later uses too; NaN if no sequence is as long."""
    class_counts = starts[:-lag] == starts[lag:]
    asked = used[:-lag][class_counts]
    return float((asked & used[lag:][class_counts]).sum() / asked.sum()) if class_counts.any() else float("nan")


def working_sets(used: NDArray[np.bool_], starts: NDArray[Any]) -> Array:
    """Return the mean number of distinct experts in all windows inside a sequence, one per WINDOWS."""
    now = np.arange(len(used), dtype=np.int32)
    last = np.maximum.accumulate(np.where(used, now[:, None], np.int32(-1)), axis=0)  # the expert's latest use
    sizes = []
    for window in WINDOWS:
        whole = now - starts >= window - 1
        inside = last[whole] > (now[whole] - window)[:, None]
        sizes.append(float(inside.sum(1).mean()) if whole.any() else float("nan"))
    return np.array(sizes)


def class_counts(used: NDArray[np.bool_], class_of: NDArray[np.int64], count: int) -> Array:
    """Return how often tokens of each class used each expert, [experts, classes]."""
    return np.stack([used[class_of == label].sum(0) for label in range(count)], axis=1).astype(float)


def information(joint: Array) -> float:
    """Return the mutual information of rows and columns, bits."""
    share = joint / joint.sum()
    independent = share.sum(1, keepdims=True) * share.sum(0, keepdims=True)
    there = share > 0
    return float((share[there] * np.log2(share[there] / independent[there])).sum())


def shuffled_information(
    used: NDArray[np.bool_], class_of: NDArray[np.int64], block: NDArray[np.int64], count: int, seed: int
) -> float:
    """Return the mean information after shuffling the classes of blocks."""
    rng = np.random.default_rng(seed)
    first = np.unique(block, return_index=True)[1]
    found = [information(class_counts(used, rng.permutation(class_of[first])[block], count)) for _ in range(SHUFFLES)]
    return float(np.mean(found))


def lift(joint: Array) -> Array:
    """Return P(class | expert) ÷ P(class), [experts, classes]; 1 for rarely used experts."""
    uses, share = joint.sum(1, keepdims=True), joint.sum(0) / joint.sum()
    ratio = np.divide(joint, uses * share, out=np.ones_like(joint), where=uses * share > 0)
    return np.where(uses >= MIN_USES, ratio, 1.0)


def bits(weights: Array) -> float:
    """Return the entropy of normalised weights, bits."""
    share = weights[weights > 0] / weights.sum()
    return float(-(share * np.log2(share)).sum())


def as_dict(facts: Facts) -> dict[str, Any]:
    """Return the statistics for --json; NaN becomes null."""
    return {
        **facts.meta,
        "tokens": facts.tokens,
        "prompt_tokens": facts.prompt_tokens,
        "sequences": facts.sequences,
        "load": {
            "entropy": rounded(facts.entropy),
            "hottest_quarter": rounded(facts.hottest),
            "dead": facts.dead.tolist(),
        },
        "reuse": {str(lag): rounded(row) for lag, row in zip(LAGS, facts.reuse, strict=True)},
        "reuse_by_popularity": rounded(facts.popular),
        "reuse_uniform": facts.uniform,
        "working_set": {str(window): rounded(row) for window, row in zip(WINDOWS, facts.working, strict=True)},
        "specialisation": {
            classification.name: {
                "shares": dict(zip(classification.labels, rounded(classification.shares), strict=True)),
                "entropy_bits": classification.entropy,
                "information_bits": rounded(classification.information),
                "shuffled_bits": rounded(classification.control),
                "specialists": {
                    label: dict(zip(("layer", "expert", "lift"), classification.specialist(label), strict=True))
                    for label in classification.labels
                },
            }
            for classification in facts.classifications
        },
    }


def rounded(values: Array) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]
