"""Conversion of traces from and to other formats, by suffix; docs/traces.md describes the formats."""

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

IDS = "experts", "expert_ids", "topk_ids", "selected_experts", "indices", "ids"  # names used by other recorders
WEIGHTS = "probs", "weights", "topk_weights", "expert_weights", "scores"
OFFSETS = "offsets", "sequence_offsets", "cu_seqlens"


def read_any(path: Path, model: str | None = None, experts: int | None = None) -> Trace:
    """Read a trace in any format. `model` and `experts` (per layer) apply if the file does not say.

    Raises ValueError, in one line, if the file has no routing.
    """
    readers = {".npz": read_npz, ".csv": read_csv, ".jsonl": read_jsonl}
    if path.suffix not in readers:
        raise ValueError(f"{path} ends with {path.suffix or 'no suffix'!r}: expected .npz, .csv or .jsonl")
    try:
        found = readers[path.suffix](path)
        if isinstance(found, Trace):
            return found
        defaults = {"model": model or path.stem, "experts": experts}
        with np.errstate(over="ignore"):  # a weight too large for float16 becomes infinite, which Trace rejects
            return assemble_trace(found, defaults) if isinstance(found, Records) else convert_arrays(found, defaults)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (*BROKEN, csv.Error, TypeError) as error:
        raise ValueError(f"{path}: {reason(error)}") from None


def write_any(trace: Trace, out: Path) -> None:
    """Write a trace atomically, in the format of the suffix."""
    if out.suffix == ".npz":
        trace.save(out)
        return
    with whole_file(out) as file:
        for line in csv_lines(trace) if out.suffix == ".csv" else jsonl_lines(trace):
            file.write(line.encode() + b"\n")


def read_npz(path: Path) -> Trace | dict[str, NDArray[Any]]:
    """Return a trace in our own format, or the arrays of another recorder."""
    arrays = read_arrays(path)
    return Trace.load(path) if "meta" in arrays and "experts" in arrays else arrays


def convert_arrays(arrays: dict[str, NDArray[Any]], defaults: dict[str, Any]) -> Trace:
    """Convert another recorder's ids [tokens, layers, k], optionally with weights and starts of sequences."""
    ids = first_present(arrays, IDS)
    if ids is None or ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise ValueError(f"it has no ids: expected integers [tokens, layers, k] named {', '.join(IDS)}")
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high > 2**16 - 2:
        raise ValueError(f"its ids range from {low} to {high}: expected 0 to {2**16 - 2}, or −1 for padding")
    weights, offsets = first_present(arrays, WEIGHTS), first_present(arrays, OFFSETS)
    meta = {**defaults, "layers": ids.shape[1], "experts": defaults["experts"] or high + 1, "top_k": ids.shape[2]}
    return Trace(
        experts=pack_ids(ids, meta["experts"]),
        offsets=np.array([0, len(ids)]) if offsets is None else offsets,
        meta=meta,
        probs=None if weights is None else weights.astype(np.float16),
    )


def first_present(arrays: dict[str, NDArray[Any]], names: tuple[str, ...]) -> NDArray[Any] | None:
    return next((arrays[name] for name in names if name in arrays), None)


def pack_ids(ids: NDArray[Any], experts: int) -> Ints:
    """Return ids in the smallest type that fits; −1, padding, becomes its highest value."""
    dtype = np.uint8 if experts < 256 else np.uint16
    return np.where(ids < 0, np.iinfo(dtype).max, ids).astype(dtype)


def assemble_trace(records: Records, defaults: dict[str, Any]) -> Trace:
    """Convert records in any order to arrays. Sequences without decoded tokens are left out, as in a recording."""
    rows = np.array(records.rows, np.int64).reshape(-1, 6)
    weights = np.array(records.weights)
    order = np.lexsort(rows.T[[4, 3, 2, 1, 0]])  # by sequence, decoded, token, layer, rank
    rows, weights = rows[order], weights[order]
    decoded = rows[:, 1] == 1
    if not decoded.any():
        raise ValueError("it has no decoded token: expected events of the phase decode")
    recorded = np.isin(rows[:, 0], rows[decoded, 0])
    sequences = np.unique(rows[decoded, 0])
    layers = int(rows[decoded, 3].max()) + 1
    parts = [Part(rows[some], weights[some], sequences) for some in (recorded & ~decoded, decoded)]
    k = max(part.k for part in parts)
    shape = {"layers": layers, "experts": defaults["experts"] or int(rows[:, 5].max()) + 1, "top_k": k}
    meta = {"model": defaults["model"], **shape, **records.meta}
    if (found := [meta["layers"], meta["top_k"]]) != [layers, k]:
        raise ValueError(f"its header says layers {found[0]}, top_k {found[1]}, but it has {layers}, {k}")
    prefill, decode = (part.arrays(meta) for part in parts)
    return Trace(
        experts=decode[0],
        probs=decode[1],
        offsets=parts[1].offsets,
        meta=meta,
        prefill=prefill[0] if len(prefill[0]) else None,
        prefill_probs=prefill[1] if len(prefill[0]) else None,
        prefill_offsets=parts[0].offsets if len(prefill[0]) else None,
    )


class Part:
    """Records of the prompts, or of the decoded tokens, sorted."""

    def __init__(self, rows: NDArray[np.int64], weights: NDArray[np.float64], sequences: NDArray[np.int64]) -> None:
        self.rows, self.weights = rows, weights
        changed = (np.diff(rows, axis=0, prepend=rows[:1] - 1) != 0) if len(rows) else np.zeros((0, 6), bool)
        token_starts = changed[:, 0] | changed[:, 2]  # a token
        event_starts = np.flatnonzero(token_starts | changed[:, 3])
        self.token = np.cumsum(token_starts) - 1
        self.rank = np.arange(len(rows)) - np.repeat(event_starts, np.diff(event_starts, append=len(rows)))
        self.k = int(self.rank.max(initial=-1)) + 1
        self.offsets = np.append(np.searchsorted(rows[token_starts, 0], sequences), np.count_nonzero(token_starts))

    def arrays(self, meta: dict[str, Any]) -> tuple[Ints, NDArray[np.float16] | None]:
        """Return ids and weights [tokens, layers, k], padded where there is no record."""
        tokens, layers, k = int(self.offsets[-1]), meta["layers"], meta["top_k"]
        if tokens * layers * k > 64 * len(self.rows) + 2**16:  # a wrong header would use up the memory
            raise ValueError(f"{len(self.rows)} ids are too few for {tokens} tokens of {layers} layers, top {k}")
        if self.rows[:, 3].max(initial=0) >= layers:
            raise ValueError(f"a prompt has layer {self.rows[:, 3].max()}, which no decoded token has")
        index = self.token, self.rows[:, 3], self.rank
        ids = np.full((tokens, layers, k), -1, np.int64)
        ids[index] = self.rows[:, 5]
        if np.isnan(self.weights).any():
            return pack_ids(ids, meta["experts"]), None
        probs = np.zeros(ids.shape, np.float16)
        probs[index] = self.weights
        return pack_ids(ids, meta["experts"]), probs
