"""Traces from and to other formats, by suffix; docs/traces.md says what each holds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.arrays import Ints
from offmoe.cache.files import whole_file
from offmoe.cache.trace import BROKEN, Trace, read_arrays, reason
from offmoe.lab.trace.text import Records, csv_lines, jsonl_lines, read_csv, read_jsonl

IDS = "experts", "expert_ids", "topk_ids", "selected_experts", "indices", "ids"  # how others call an array
WEIGHTS = "probs", "weights", "topk_weights", "expert_weights", "scores"
OFFSETS = "offsets", "sequence_offsets", "cu_seqlens"


def read_any(path: Path, model: str | None = None, experts: int | None = None) -> Trace:
    """`model` and `experts` a layer where the file does not say. ValueError, one line, for what is no routing."""
    readers = {".npz": read_npz, ".csv": read_csv, ".jsonl": read_jsonl}
    if path.suffix not in readers:
        raise ValueError(f"{path} ends with {path.suffix or 'no suffix'!r}: expected .npz, .csv or .jsonl")
    try:
        found = readers[path.suffix](path)
        if isinstance(found, Trace):
            return found
        told = {"model": model or path.stem, "experts": experts}
        with np.errstate(over="ignore"):  # a weight that float16 does not hold is refused as infinite
            return assemble(found, told) if isinstance(found, Records) else adopt(found, told)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (*BROKEN, csv.Error, TypeError) as error:
        raise ValueError(f"{path}: {reason(error)}") from None


def write_any(trace: Trace, out: Path) -> None:
    """Whole or not at all."""
    if out.suffix == ".npz":
        trace.save(out)
        return
    with whole_file(out) as file:
        for line in csv_lines(trace) if out.suffix == ".csv" else jsonl_lines(trace):
            file.write(line.encode() + b"\n")


def read_npz(path: Path) -> Trace | dict[str, NDArray[Any]]:
    """One of ours, or the arrays of another recorder."""
    arrays = read_arrays(path)
    return Trace.load(path) if "meta" in arrays and "experts" in arrays else arrays


def adopt(arrays: dict[str, NDArray[Any]], told: dict[str, Any]) -> Trace:
    """Another recorder's ids [tokens, layers, k], perhaps with weights, and where sequences start."""
    ids = first_of(arrays, IDS)
    if ids is None or ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise ValueError(f"it has no ids: expected whole numbers [tokens, layers, k] under {', '.join(IDS)}")
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high > 2**16 - 2:
        raise ValueError(f"its ids reach from {low} to {high}: expected 0 to {2**16 - 2}, −1 for padding")
    weights, offsets = first_of(arrays, WEIGHTS), first_of(arrays, OFFSETS)
    meta = {**told, "layers": ids.shape[1], "experts": told["experts"] or high + 1, "top_k": ids.shape[2]}
    return Trace(
        experts=packed(ids, meta["experts"]),
        offsets=np.array([0, len(ids)]) if offsets is None else offsets,
        meta=meta,
        probs=None if weights is None else weights.astype(np.float16),
    )


def first_of(arrays: dict[str, NDArray[Any]], names: tuple[str, ...]) -> NDArray[Any] | None:
    return next((arrays[name] for name in names if name in arrays), None)


def packed(ids: NDArray[Any], experts: int) -> Ints:
    """−1, padding, becomes the highest value of the smallest type that holds all ids."""
    dtype = np.uint8 if experts < 256 else np.uint16
    return np.where(ids < 0, np.iinfo(dtype).max, ids).astype(dtype)


def assemble(records: Records, told: dict[str, Any]) -> Trace:
    """Records in any order to arrays. Sequences of which nothing was decoded are left out, as in a recording."""
    rows = np.array(records.rows, np.int64).reshape(-1, 6)
    weights = np.array(records.weights)
    order = np.lexsort(rows.T[[4, 3, 2, 1, 0]])  # by sequence, decoded, token, layer, rank
    rows, weights = rows[order], weights[order]
    decoded = rows[:, 1] == 1
    if not decoded.any():
        raise ValueError("it holds no decoded token: expected events of the phase decode")
    kept = np.isin(rows[:, 0], rows[decoded, 0])
    sequences = np.unique(rows[decoded, 0])
    layers = int(rows[decoded, 3].max()) + 1
    parts = [Part(rows[some], weights[some], sequences) for some in (kept & ~decoded, decoded)]
    k = max(part.k for part in parts)
    shape = {"layers": layers, "experts": told["experts"] or int(rows[:, 5].max()) + 1, "top_k": k}
    meta = {"model": told["model"], **shape, **records.meta}
    if (found := [meta["layers"], meta["top_k"]]) != [layers, k]:
        raise ValueError(f"it says layers {found[0]}, top_k {found[1]} and holds {layers}, {k}")
    before, after = (part.arrays(meta) for part in parts)
    return Trace(
        experts=after[0],
        probs=after[1],
        offsets=parts[1].offsets,
        meta=meta,
        prefill=before[0] if len(before[0]) else None,
        prefill_probs=before[1] if len(before[0]) else None,
        prefill_offsets=parts[0].offsets if len(before[0]) else None,
    )


class Part:
    """The prompts' records, or the decoded ones, sorted."""

    def __init__(self, rows: NDArray[np.int64], weights: NDArray[np.float64], sequences: NDArray[np.int64]) -> None:
        self.rows, self.weights = rows, weights
        changed = (np.diff(rows, axis=0, prepend=rows[:1] - 1) != 0) if len(rows) else np.zeros((0, 6), bool)
        begins = changed[:, 0] | changed[:, 2]  # a token
        event = np.flatnonzero(begins | changed[:, 3])
        self.token = np.cumsum(begins) - 1
        self.place = np.arange(len(rows)) - np.repeat(event, np.diff(event, append=len(rows)))
        self.k = int(self.place.max(initial=-1)) + 1
        self.offsets = np.append(np.searchsorted(rows[begins, 0], sequences), np.count_nonzero(begins))

    def arrays(self, meta: dict[str, Any]) -> tuple[Ints, NDArray[np.float16] | None]:
        """Ids and weights [tokens, layers, k]; padded where nothing was said."""
        tokens, layers, k = int(self.offsets[-1]), meta["layers"], meta["top_k"]
        if tokens * layers * k > 64 * len(self.rows) + 2**16:  # a lie would take all memory
            raise ValueError(f"{len(self.rows)} ids do not fill {tokens} tokens of {layers} layers, top {k}")
        if self.rows[:, 3].max(initial=0) >= layers:
            raise ValueError(f"a prompt has layer {self.rows[:, 3].max()} and no decoded token has")
        at = self.token, self.rows[:, 3], self.place
        ids = np.full((tokens, layers, k), -1, np.int64)
        ids[at] = self.rows[:, 5]
        if np.isnan(self.weights).any():
            return packed(ids, meta["experts"]), None
        probs = np.zeros(ids.shape, np.float16)
        probs[at] = self.weights
        return packed(ids, meta["experts"]), probs
