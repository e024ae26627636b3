"""What a trace says about its model: how uneven the load is, how stable the routing, whether experts specialise."""

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
SHUFFLES = 8  # of the control; its mean over 30 layers is then good to about 1 %
POSITIONS = (4, 16, 64)
FEW = 20  # uses below which an expert is called no specialist


@dataclass(frozen=True)
class Classing:
    """Tokens divided one way, and how much the choice of expert has to do with it, in bits a routed expert."""

    name: str
    labels: list[str]
    shares: Array  # [classes] of the tokens
    information: Array  # [layers] mutual information of class and expert
    control: Array  # [layers] the same with the classes shuffled: what a finite sample shows of nothing
    lift: Array  # [layers, experts, classes] P(class | expert) ÷ P(class); 1: indifferent, or used too rarely

    @property
    def entropy(self) -> float:
        """Bits: the most that there is to know about the class."""
        shares = self.shares[self.shares > 0]
        return float(-(shares * np.log2(shares)).sum())

    @property
    def known(self) -> Array:
        """[layers] share of a token's class that one of its experts tells, beyond chance."""
        beyond = self.information - self.control
        return beyond / self.entropy if self.entropy else np.zeros_like(beyond)

    def specialist(self, label: str) -> tuple[int, int, float]:
        """Layer, expert and lift of the one that is most `label`'s."""
        lifts = self.lift[..., self.labels.index(label)]
        layer, expert = np.unravel_index(int(lifts.argmax()), lifts.shape)
        return int(layer), int(expert), float(lifts.max())


@dataclass(frozen=True)
class Facts:
    """All of decoded tokens."""

    meta: dict[str, Any]
    tokens: int
    prompt_tokens: int
    sequences: int
    load: Array  # [layers, experts] uses ÷ what an even load would give
    entropy: Array  # [layers] of the load ÷ the most possible
    hottest: Array  # [layers] share of the uses that goes to the hottest quarter of experts
    dead: NDArray[np.int64]  # [layers] experts never used
    reuse: Array  # [LAGS, layers] share of a token's experts that the token so much later asks for too
    popular: Array  # [layers] the same of two tokens taken at random: what popularity alone would give
    working: Array  # [WINDOWS, layers] distinct experts in a window; NaN where no sequence is as long
    classings: list[Classing]

    @property
    def uniform(self) -> float:
        """Reuse of a router that throws dice."""
        return float(self.meta["top_k"] / self.meta["experts"])


def examine(trace: Trace) -> Facts:
    layers, experts = trace.meta["layers"], trace.meta["experts"]
    ways = list(classes(trace))
    seen = [Layer.of(trace, layer, ways) for layer in range(layers)]
    load = np.stack([layer.uses for layer in seen]).astype(float)
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
        reuse=np.stack([layer.reuse for layer in seen], axis=1),
        popular=np.array([layer.popular for layer in seen]),
        working=np.stack([layer.working for layer in seen], axis=1),
        classings=[
            Classing(
                name,
                labels,
                np.bincount(of, minlength=len(labels)) / len(of),
                np.array([layer.information[i][0] for layer in seen]),
                np.array([layer.information[i][1] for layer in seen]),
                np.stack([layer.lifts[i] for layer in seen]),
            )
            for i, (name, labels, of, _) in enumerate(ways)
        ],
    )


Way = tuple[str, list[str], NDArray[np.int64], NDArray[np.int64]]  # name, labels, class and block of every token


def classes(trace: Trace) -> Iterator[Way]:
    """The ways to divide the tokens. What is shuffled in a control are blocks: tokens, or whole sequences."""
    each = np.arange(len(trace.experts))
    sequence = np.repeat(np.arange(trace.sequences), np.diff(trace.offsets))
    position = each - trace.offsets[sequence]
    labels = [f"{low}–{high - 1}" for low, high in zip((0, *POSITIONS), POSITIONS, strict=False)]
    yield "position", [*labels, f"{POSITIONS[-1]}–"], np.searchsorted(POSITIONS, position, side="right"), each
    pieces = trace.meta.get("pieces")
    if trace.tokens is not None and isinstance(pieces, dict) and pieces:
        kinds = [token_kind(str(pieces.get(str(token), ""))) for token in trace.tokens.tolist()]
        yield "token", *numbered(kinds), each
    names = trace.meta.get("classes", [])
    if len(set(names)) > 1:
        found, of = numbered(names)
        yield "prompt", found, of[sequence], sequence


def numbered(names: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct names, commonest first, and each one's number."""
    found = sorted(set(names), key=lambda name: (-names.count(name), name))
    number = {name: i for i, name in enumerate(found)}
    return [name or "(none)" for name in found], np.array([number[name] for name in names], np.int64)


def token_kind(piece: str) -> str:
    """The class of a token by its text."""
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
    """The figures of one layer."""

    uses: NDArray[np.int64]  # [experts]
    reuse: Array  # [LAGS]
    popular: float
    working: Array  # [WINDOWS]
    information: list[tuple[float, float]]  # a classing: real, shuffled
    lifts: list[Array]  # a classing: [experts, classes]

    @classmethod
    def of(cls, trace: Trace, layer: int, ways: list[Way]) -> Layer:
        hot = chosen(trace, layer)  # [tokens, experts]
        uses = hot.sum(0, dtype=np.int64)
        starts = np.repeat(trace.offsets[:-1], np.diff(trace.offsets))  # [tokens] of the token's sequence
        joint = [together(hot, of, len(labels)) for _, labels, of, _ in ways]
        return cls(
            uses=uses,
            reuse=np.array([reuse_at(hot, starts, lag) for lag in LAGS]),
            popular=float((uses / len(hot)) @ uses / uses.sum()),
            working=working_sets(hot, starts),
            information=[
                (information(joint[i]), shuffled(hot, of, block, len(labels), seed=layer))
                for i, (_, labels, of, block) in enumerate(ways)
            ],
            lifts=[lift(table) for table in joint],
        )


def chosen(trace: Trace, layer: int) -> NDArray[np.bool_]:
    """[tokens, experts] whether the token asked for the expert."""
    ids = trace.experts[:, layer].astype(np.int64)
    hot = np.zeros((len(ids), trace.meta["experts"] + 1), np.bool_)
    np.put_along_axis(hot, np.minimum(ids, trace.meta["experts"]), True, axis=1)
    return hot[:, :-1]  # the last column took the padding


def reuse_at(hot: NDArray[np.bool_], starts: NDArray[Any], lag: int) -> float:
    """NaN where no sequence is as long."""
    together = starts[:-lag] == starts[lag:]
    asked = hot[:-lag][together]
    return float((asked & hot[lag:][together]).sum() / asked.sum()) if together.any() else float("nan")


def working_sets(hot: NDArray[np.bool_], starts: NDArray[Any]) -> Array:
    """Mean number of distinct experts in every window that lies within a sequence."""
    now = np.arange(len(hot), dtype=np.int32)
    last = np.maximum.accumulate(np.where(hot, now[:, None], np.int32(-1)), axis=0)  # the expert's latest use
    sizes = []
    for window in WINDOWS:
        whole = now - starts >= window - 1
        inside = last[whole] > (now[whole] - window)[:, None]
        sizes.append(float(inside.sum(1).mean()) if whole.any() else float("nan"))
    return np.array(sizes)


def together(hot: NDArray[np.bool_], of: NDArray[np.int64], count: int) -> Array:
    """[experts, classes] how often a token of the class asked for the expert."""
    return np.stack([hot[of == label].sum(0) for label in range(count)], axis=1).astype(float)


def information(joint: Array) -> float:
    """Mutual information of rows and columns, bits."""
    share = joint / joint.sum()
    independent = share.sum(1, keepdims=True) * share.sum(0, keepdims=True)
    there = share > 0
    return float((share[there] * np.log2(share[there] / independent[there])).sum())


def shuffled(hot: NDArray[np.bool_], of: NDArray[np.int64], block: NDArray[np.int64], count: int, seed: int) -> float:
    """The information that remains when blocks exchange their classes."""
    rng = np.random.default_rng(seed)
    first = np.unique(block, return_index=True)[1]
    found = [information(together(hot, rng.permutation(of[first])[block], count)) for _ in range(SHUFFLES)]
    return float(np.mean(found))


def lift(joint: Array) -> Array:
    uses, share = joint.sum(1, keepdims=True), joint.sum(0) / joint.sum()
    ratio = np.divide(joint, uses * share, out=np.ones_like(joint), where=uses * share > 0)
    return np.where(uses >= FEW, ratio, 1.0)


def bits(weights: Array) -> float:
    share = weights[weights > 0] / weights.sum()
    return float(-(share * np.log2(share)).sum())


def as_dict(facts: Facts) -> dict[str, Any]:
    """For --json; NaN becomes null."""
    return {
        **facts.meta,
        "tokens": facts.tokens,
        "prompt_tokens": facts.prompt_tokens,
        "sequences": facts.sequences,
        "load": {
            "entropy": plain(facts.entropy),
            "hottest_quarter": plain(facts.hottest),
            "dead": facts.dead.tolist(),
        },
        "reuse": {str(lag): plain(row) for lag, row in zip(LAGS, facts.reuse, strict=True)},
        "reuse_by_popularity": plain(facts.popular),
        "reuse_uniform": facts.uniform,
        "working_set": {str(window): plain(row) for window, row in zip(WINDOWS, facts.working, strict=True)},
        "specialisation": {
            way.name: {
                "shares": dict(zip(way.labels, plain(way.shares), strict=True)),
                "entropy_bits": way.entropy,
                "information_bits": plain(way.information),
                "shuffled_bits": plain(way.control),
                "specialists": {
                    label: dict(zip(("layer", "expert", "lift"), way.specialist(label), strict=True))
                    for label in way.labels
                },
            }
            for way in facts.classings
        },
    }


def plain(values: Array) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]
