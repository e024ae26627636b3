"""Routing as lines of text: CSV and JSON lines, in our format and in those of other recorders."""

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
SHAPE = "model", "layers", "experts", "top_k"  # keys of the metadata, written in a comment at the top
NAMES = {  # column names used by other recorders
    "sequence": ("sequence", "seq", "seq_id", "prompt_id", "request_id"),
    "token": ("token", "pos", "position", "token_pos", "token_idx", "token_index", "step"),
    "layer": ("layer", "layer_id", "layer_idx", "il"),
    "phase": ("phase", "stage"),
    "experts": ("experts", "expert_ids", "topk_ids", "selected_experts", "expert", "expert_id"),
    "weights": ("weights", "probs", "topk_weights", "expert_weights", "weight", "prob", "score"),
    "rank": ("rank", "slot", "k"),
}
PREFILL = ("prefill", "prompt")
HIGH = 2**16 - 2  # highest id; 65535 is padding


class Records:
    """Routing events in columns: sequence, decoded, token, layer, rank, expert, and a weight (NaN if unknown)."""

    def __init__(self) -> None:
        self.rows = array("q")
        self.weights = array("d")
        self.meta: dict[str, Any] = {}

    def add(self, key: tuple[int, bool, int, int, int], ids: Sequence[int], weights: Sequence[float]) -> None:
        """Add the event `key`: (sequence, decoded, token, layer, rank of the first id).

        Raises ValueError if it is invalid.
        """
        if min(key) < 0 or key[3] > HIGH or any(not 0 <= id <= HIGH for id in ids):
            raise ValueError(f"a number is below 0, or an expert or layer above {HIGH}")
        if weights and len(weights) != len(ids):
            raise ValueError(f"{len(weights)} weights for {len(ids)} experts")
        if not all(map(math.isfinite, weights)):
            raise ValueError("a weight is not a finite number")
        for i, id in enumerate(ids):
            self.rows.extend((*key[:4], key[4] + i, id))
            self.weights.append(weights[i] if weights else float("nan"))


def read_csv(path: Path) -> Records:
    """Read one line per event, with ids and weights separated by spaces, or one line per expert, optionally with its
    rank.
    """
    records = Records()
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        positions: dict[str, int] = {}
        for row in rows:
            if not row or row[0].startswith("#"):
                records.meta |= comment(",".join(row))
                continue
            if not positions:
                positions = columns(row)
                continue
            try:
                read_row({name: row[place] for name, place in positions.items()}, records)
            except (ValueError, IndexError, OverflowError) as error:
                raise ValueError(f"line {rows.line_num}: {error}") from None
    return records


def comment(line: str) -> dict[str, Any]:
    """Return what a comment says about the model, if it is JSON."""
    try:
        value = json.loads(line.lstrip("# "))
    except ValueError:
        return {}
    return {name: value[name] for name in SHAPE if name in value} if isinstance(value, dict) else {}


def columns(header: list[str]) -> dict[str, int]:
    """Return our column names → positions. Raises ValueError if a required column is missing."""
    names = [name.strip().lower() for name in header]
    found = {ours: names.index(name) for ours, known in NAMES.items() for name in reversed(known) if name in names}
    for name in ("token", "layer", "experts"):
        if name not in found:
            raise ValueError(f"there is no column {name!r} in {','.join(names)[:80]!r}: expected {HEADER}")
    return found


def read_row(cell: dict[str, str], records: Records) -> None:
    """Add one line of a CSV file to `records`."""
    rank = int(cell.get("rank", 0)) if cell.get("rank", "0").strip().isdecimal() else 0
    key = int(cell.get("sequence", 0)), is_decode(cell), int(cell["token"]), int(cell["layer"]), rank
    records.add(
        key,
        [int(word) for word in split_cell(cell["experts"])],
        [float(w) for w in split_cell(cell.get("weights", ""))],
    )


def split_cell(text: str) -> list[str]:
    """Return the numbers in one cell, whatever separates them."""
    return text.translate(str.maketrans("[]();,|", "       ")).split()


def is_decode(row: dict[str, Any]) -> bool:
    """Return whether a line belongs to the decode phase."""
    return str(row.get("phase", "decode")).strip().lower() not in PREFILL


def read_jsonl(path: Path) -> Records:
    """Read one line per token: `experts`, a list of ids per layer; optionally weights in the same form, sequence,
    token, phase.
    """
    records = Records()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if isinstance(row.get("experts"), int):  # the header line that we write
                    records.meta |= {name: row[name] for name in SHAPE if name in row}
                    continue
                token, sequence = int(row.get("token", number)), int(row.get("sequence", 0))
                layers = row["experts"]
                weights = row.get("weights") or [[]] * len(layers)
                for layer, (ids, layer_ids) in enumerate(zip(layers, weights, strict=True)):
                    records.add((sequence, is_decode(row), token, layer, 0), ids, layer_ids)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise ValueError(f"line {number} is not a token: {type(error).__name__}: {error}") from None
    return records


def csv_lines(trace: Trace) -> Iterator[str]:
    """Yield the lines of a CSV file."""
    yield f"# {json.dumps({name: trace.meta[name] for name in SHAPE})}"
    yield HEADER
    for sequence, phase, token, ids, weights in events(trace):
        for layer, layer_ids in enumerate(ids):
            if layer_ids:
                shares = joined(weights[layer]) if weights else ""
                yield f"{sequence},{token},{layer},{phase},{joined(layer_ids)},{shares}"


def jsonl_lines(trace: Trace) -> Iterator[str]:
    """Yield the lines of a JSON lines file."""
    yield json.dumps({name: trace.meta[name] for name in SHAPE})
    for sequence, phase, token, ids, weights in events(trace):
        row = {"sequence": sequence, "token": token, "phase": phase, "experts": ids}
        yield json.dumps(row | ({"weights": weights} if weights else {}))


def joined(values: Sequence[float]) -> str:
    return " ".join(map(str, values))


def events(trace: Trace) -> Iterator[tuple[int, str, int, list[list[int]], list[list[float]]]]:
    """Yield every token in order of time: a sequence's prompt, then its decoded tokens; without padding."""
    for sequence in range(trace.sequences):
        first = 0
        for phase, of, ids, probs in (
            ("prefill", trace.prompts, trace.prefill, trace.prefill_probs),
            ("decode", trace.offsets, trace.experts, trace.probs),
        ):
            if ids is None:
                continue
            start, end = of[sequence : sequence + 2]
            for key in range(start, end):
                known = [layer[layer != np.iinfo(layer.dtype).max].tolist() for layer in ids[key]]
                counted = () if probs is None else zip(probs[key], known, strict=True)
                shares = [
                    [float(f"{weight:.5g}") for weight in layer[: len(layer_ids)]] for layer, layer_ids in counted
                ]
                yield sequence, phase, first + int(key - start), known, shares
            first += int(end - start)
