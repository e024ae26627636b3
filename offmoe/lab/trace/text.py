"""Routing as lines of text: CSV and JSON lines, ours and what other recorders write."""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offmoe.cache.trace import Trace

HEADER = "sequence,token,layer,phase,experts,weights"
SHAPE = "model", "layers", "experts", "top_k"  # of meta, in a comment at the top
NAMES = {  # how others call a column
    "sequence": ("sequence", "seq", "seq_id", "prompt_id", "request_id"),
    "token": ("token", "pos", "position", "token_pos", "token_idx", "token_index", "step"),
    "layer": ("layer", "layer_id", "layer_idx", "il"),
    "phase": ("phase", "stage"),
    "experts": ("experts", "expert_ids", "topk_ids", "selected_experts", "expert", "expert_id"),
    "weights": ("weights", "probs", "topk_weights", "expert_weights", "weight", "prob", "score"),
    "rank": ("rank", "slot", "k"),
}
PREFILL = ("prefill", "prompt")
HIGH = 2**16 - 2  # 65535 is padding


class Records:
    """Routed records in columns: sequence, decoded, token, layer, rank, expert, and a weight (NaN: unknown)."""

    def __init__(self) -> None:
        self.rows = array("q")
        self.weights = array("d")
        self.meta: dict[str, Any] = {}

    def add(self, at: tuple[int, bool, int, int, int], ids: Sequence[int], weights: Sequence[float]) -> None:
        """The event (sequence, decoded, token, layer, rank of the first id)."""
        if min(at) < 0 or at[3] > HIGH or any(not 0 <= id <= HIGH for id in ids):
            raise ValueError(f"a number is below 0, or an expert or layer above {HIGH}")
        if weights and len(weights) != len(ids):
            raise ValueError(f"{len(weights)} weights of {len(ids)} experts")
        if not all(map(math.isfinite, weights)):
            raise ValueError("a weight is no finite number")
        for i, id in enumerate(ids):
            self.rows.extend((*at[:4], at[4] + i, id))
            self.weights.append(weights[i] if weights else float("nan"))


def read_csv(path: Path) -> Records:
    """A line an event, ids and weights with spaces between, or a line an expert, perhaps with its rank."""
    records = Records()
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        places: dict[str, int] = {}
        for row in rows:
            if not row or row[0].startswith("#"):
                records.meta |= comment(",".join(row))
                continue
            if not places:
                places = columns(row)
                continue
            try:
                read_row({name: row[place] for name, place in places.items()}, records)
            except (ValueError, IndexError, OverflowError) as error:
                raise ValueError(f"line {rows.line_num}: {error}") from None
    return records


def comment(line: str) -> dict[str, Any]:
    """What a comment says of the model, if it is JSON."""
    try:
        found = json.loads(line.lstrip("# "))
    except ValueError:
        return {}
    return {name: found[name] for name in SHAPE if name in found} if isinstance(found, dict) else {}


def columns(header: list[str]) -> dict[str, int]:
    """Our name of a column → its place."""
    names = [name.strip().lower() for name in header]
    found = {ours: names.index(name) for ours, known in NAMES.items() for name in reversed(known) if name in names}
    for name in ("token", "layer", "experts"):
        if name not in found:
            raise ValueError(f"there is no column {name!r} in {','.join(names)[:80]!r}: expected {HEADER}")
    return found


def read_row(cell: dict[str, str], records: Records) -> None:
    rank = int(cell.get("rank", 0)) if cell.get("rank", "0").strip().isdecimal() else 0
    at = int(cell.get("sequence", 0)), decodes(cell), int(cell["token"]), int(cell["layer"]), rank
    records.add(at, [int(word) for word in words(cell["experts"])], [float(w) for w in words(cell.get("weights", ""))])


def words(text: str) -> list[str]:
    """What stands in one cell, whatever is between."""
    return text.translate(str.maketrans("[]();,|", "       ")).split()


def decodes(row: dict[str, Any]) -> bool:
    return str(row.get("phase", "decode")).strip().lower() not in PREFILL


def read_jsonl(path: Path) -> Records:
    """A line a token: experts, a list of ids a layer; perhaps weights likewise, sequence, token, phase."""
    records = Records()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if isinstance(row.get("experts"), int):  # the head that we write
                    records.meta |= {name: row[name] for name in SHAPE if name in row}
                    continue
                token, sequence = int(row.get("token", number)), int(row.get("sequence", 0))
                layers = row["experts"]
                weights = row.get("weights") or [[]] * len(layers)
                for layer, (ids, some) in enumerate(zip(layers, weights, strict=True)):
                    records.add((sequence, decodes(row), token, layer, 0), ids, some)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise ValueError(f"line {number} is no token: {type(error).__name__}: {error}") from None
    return records


def csv_lines(trace: Trace) -> Iterator[str]:
    yield f"# {json.dumps({name: trace.meta[name] for name in SHAPE})}"
    yield HEADER
    for sequence, phase, token, ids, weights in events(trace):
        for layer, some in enumerate(ids):
            if some:
                yield f"{sequence},{token},{layer},{phase},{spaced(some)},{spaced(weights[layer]) if weights else ''}"


def jsonl_lines(trace: Trace) -> Iterator[str]:
    yield json.dumps({name: trace.meta[name] for name in SHAPE})
    for sequence, phase, token, ids, weights in events(trace):
        row = {"sequence": sequence, "token": token, "phase": phase, "experts": ids}
        yield json.dumps(row | ({"weights": weights} if weights else {}))


def spaced(values: Sequence[float]) -> str:
    return " ".join(map(str, values))


def events(trace: Trace) -> Iterator[tuple[int, str, int, list[list[int]], list[list[float]]]]:
    """Every token in the order of time: a sequence's prompt, then what was decoded; without padding."""
    for sequence in range(trace.sequences):
        first = 0
        for phase, of, ids, probs in (
            ("prefill", trace.prompts, trace.prefill, trace.prefill_probs),
            ("decode", trace.offsets, trace.experts, trace.probs),
        ):
            if ids is None:
                continue
            start, end = of[sequence : sequence + 2]
            for at in range(start, end):
                known = [layer[layer != np.iinfo(layer.dtype).max].tolist() for layer in ids[at]]
                counted = () if probs is None else zip(probs[at], known, strict=True)
                shares = [[float(f"{weight:.5g}") for weight in layer[: len(some)]] for layer, some in counted]
                yield sequence, phase, first + int(at - start), known, shares
            first += int(end - start)
