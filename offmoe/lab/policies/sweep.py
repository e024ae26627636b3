"""Replay of traces × scopes × slots × policies × predictors, one row per combination."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from offmoe.app.terminal import console, progress_bar
from offmoe.cache.ahead import Foresight, Pace, foresee
from offmoe.cache.files import check_output, whole_file
from offmoe.cache.plugin import is_plugin
from offmoe.cache.policy import policy_for, understand
from offmoe.cache.predictor import make_predictor
from offmoe.cache.replay import Outcome, check_pool, replay
from offmoe.cache.trace import Trace
from offmoe.errors import OffmoeError, users_mistakes
from offmoe.settings import parse_size

LRU, BELADY, BYPASS = "lru", "belady", "belady-bypass"
SELECTION = ("random", LRU, "lfu", "lfru", "slru", "crf:h=16", "crf:h=64", "crf+tinylfu", "echo")
FRACTIONS = (0.25, 0.5)
WARM_UP_TOKENS = 64  # first tokens, in which the cache fills
TIMED = {"timely", "late_per_token", "late_wait_ms", "stall_ms_per_token"}  # meaningless if copies take no time
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One replay to run."""

    policy: str
    scope: str
    slots: int
    prefetch: str


@dataclass(frozen=True)
class Plan:
    """Replays of one trace."""

    path: Path
    trace: Trace
    cells: list[Cell]
    record: int | None  # bytes of one expert
    pace: Pace | None


def run(
    traces: Sequence[Path],
    slots: Sequence[int],
    fractions: Sequence[float],
    policies: Sequence[str],
    scopes: Sequence[str],
    tokens: int | None,
    prefetch: Sequence[str],
    link: str | None,
    record: str | None,
    floor: float,
    per_layer: bool,
    csv: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run `offmoe bench policies`."""
    rows: list[Row] = []
    with users_mistakes():
        if csv:
            check_output(csv, force)
        opened = [(path, truncate(Trace.load(path), tokens)) for path in traces]
        plans: list[Plan] = []
        for path, trace in opened:
            cells = make_cells(trace, slots, fractions, policies, scopes, prefetch)
            size = parse_size(record) if record else trace.meta.get("record_bytes")
            plans.append(Plan(path, trace, cells, size, make_pace(trace, link, size, floor)))
    warn_small_pools(cell for plan in plans for cell in plan.cells if cell.slots < plan.trace.meta["top_k"])
    with users_mistakes(), progress_bar("replaying") as progress:
        total = sum(len(plan.cells) for plan in plans)
        for row in (row for plan in plans for row in replay_rows(plan, per_layer)):
            rows.append(row)
            progress(row["policy"], len(rows), total)
            if as_json:
                click.echo(json.dumps(row, ensure_ascii=False))
    if not as_json:
        from offmoe.lab.policies.table import tables

        console().print(*tables(rows), sep="\n")
    if csv:
        with users_mistakes():
            write_csv(csv, rows)
    for name in {row["policy"] for row in rows if is_plugin(row["policy"])}:
        if not understand(name, {})[0].state:
            click.echo(f"{name}: no GPU kernel evaluates its score, so it runs only in replay and on the CPU", err=True)


def truncate(trace: Trace, tokens: int | None) -> Trace:
    """Return the trace, or its first tokens without their prompts."""
    if tokens is None or tokens >= len(trace.experts):
        return trace
    bounds = trace.offsets[(trace.offsets > 0) & (trace.offsets < tokens)]
    arrays = {
        name: None if (array := getattr(trace, name)) is None else array[:tokens]
        for name in ("probs", "tokens", "states", "logits")
    }
    meta = {key: value for key, value in trace.meta.items() if key != "classes"}
    return Trace(trace.experts[:tokens], np.array([0, *bounds, tokens]), meta, gates=trace.gates, **arrays)


def make_cells(
    trace: Trace,
    slots: Sequence[int],
    fractions: Sequence[float],
    policies: Sequence[str],
    scopes: Sequence[str],
    prefetch: Sequence[str],
) -> list[Cell]:
    """Return all replays of a trace. Raises an error before the first one if any of them is impossible.

    For every scope and number of slots, lru and the two Belady bounds are added, the bounds without a predictor.
    """
    experts, k = trace.meta["experts"], trace.meta["top_k"]
    sizes = [*slots, *(max(1, round(fraction * experts)) for fraction in fractions)]
    if not sizes:
        sizes = [max(k, round(fraction * experts)) for fraction in FRACTIONS]
    named = list(dict.fromkeys(policy_for(trace, spec).name for spec in (*(policies or SELECTION), LRU)))
    ahead = list(dict.fromkeys(canonical_predictor(trace, spec) for spec in prefetch or ("none",)))
    cells = []
    for scope in dict.fromkeys(scopes or ("layer",)):
        for size in dict.fromkeys(min(size, experts) for size in sizes):
            check_pool(trace, size, scope)
            cells += [Cell(name, scope, size, spec) for name in named if name not in (BELADY, BYPASS) for spec in ahead]
            cells += [Cell(name, scope, size, "none") for name in (BELADY, BYPASS)]
    return cells


def canonical_predictor(trace: Trace, prefetch: str) -> str:
    """Return the full name of a predictor, defaults included."""
    predictor = make_predictor(prefetch, trace)
    return predictor.name if predictor else "none"


def make_pace(trace: Trace, link: str | None, record: Any, floor: float) -> Pace | None:
    """Return the time of copies, or None if copies take no time."""
    if record is not None and (not isinstance(record, int) or record <= 0):
        raise OffmoeError(f"an expert of {record!r} bytes is not possible: give its size with --record")
    if link is None:
        if floor:
            raise OffmoeError("--floor needs --link: give a bandwidth, or measure")
        return None
    if record is None:
        raise OffmoeError("--link needs --record, the size of one expert: `offmoe info MODEL` prints it")
    speed = measure_link() if link == "measure" else float(parse_size(link))
    if speed <= 0:
        raise OffmoeError(f"--link {link!r} is not a bandwidth: give for example 25GB, or measure")
    return Pace(record / speed, floor / 1e3 / trace.meta["layers"])


def measure_link() -> float:
    """Measure this machine's bandwidth to slots, in bytes/s."""
    import torch

    from offmoe.machine.bandwidth import link_bandwidth

    return link_bandwidth(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def warn_small_pools(cells: Iterator[Cell]) -> None:
    """Warn of global pools that are smaller than the experts of one token."""
    for slots in sorted({cell.slots for cell in cells}):
        click.echo(
            f"a global pool of {slots} slots per layer is smaller than what one token uses: lru will never hit",
            err=True,
        )


def replay_rows(plan: Plan, per_layer: bool) -> Iterator[Row]:
    """Yield one row per cell."""
    bounds: dict[tuple[str, int], tuple[float, float]] = {}  # hit rates of lru and belady
    trace, pace = plan.trace, plan.pace
    for cell in plan.cells:
        pool = cell.scope, cell.slots
        if pool not in bounds:
            lru, belady = (replay(trace, name, cell.slots, cell.scope).hit_rate for name in (LRU, BELADY))
            bounds[pool] = lru, belady
        outcome: Outcome = (
            replay(trace, cell.policy, cell.slots, cell.scope)
            if cell.prefetch == "none" and pace is None
            else foresee(trace, cell.policy, cell.slots, cell.scope, cell.prefetch, pace)
        )
        head = {"trace": plan.path.name, "model": trace.meta["model"], "prefetch": cell.prefetch}
        yield head | figures(outcome, *bounds[pool], per_layer, pace is not None) | byte_figures(outcome, plan.record)


def figures(outcome: Outcome, lru: float, belady: float, per_layer: bool, timed: bool) -> Row:
    """Return the numbers of one replay; a ratio with an empty denominator is None."""
    first, after = outcome.between(0, WARM_UP_TOKENS), outcome.between(WARM_UP_TOKENS)
    row = {
        "policy": outcome.policy,
        "scope": outcome.scope,
        "slots": outcome.slots,
        "tokens": len(outcome.hit),
        "hit_rate": outcome.hit_rate,
        "hit_rate_first_64": first.hit_rate,
        "hit_rate_after_64": after.hit_rate if after.routed else None,
        "misses_per_token": outcome.misses_per_token,
        "uploads_per_token": outcome.uploads_per_token,
        "gap_captured": (outcome.hit_rate - lru) / (belady - lru) if belady > lru else None,
    }
    if isinstance(outcome, Foresight):
        row |= {key: value for key, value in outcome.figures().items() if timed or key not in TIMED}
    if per_layer:
        row["hit_rate_by_layer"] = [round(rate, 6) for rate in outcome.hit_rate_by_layer.tolist()]
    return row


def byte_figures(outcome: Outcome, record: int | None) -> Row:
    """Return the bytes that cross the link, if the size of an expert is known."""
    if record is None:
        return {}
    row = {"upload_bytes_per_token": outcome.uploads_per_token * record}
    if isinstance(outcome, Foresight):
        row["wasted_bytes_per_token"] = outcome.wasted / len(outcome.hit) * record
    return row


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write the file atomically; the hit rates of the layers share one field, separated by spaces."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with whole_file(path) as raw:
        file = io.TextIOWrapper(raw, "utf-8", newline="", write_through=True)
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
        file.detach()
