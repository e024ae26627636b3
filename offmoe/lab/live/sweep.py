"""Measurements of a sweep, their order, and the resumption of an interrupted one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from offmoe.cache.trace import Trace
from offmoe.errors import OffmoeError
from offmoe.lab.live.folder import Cell, Folder
from offmoe.lab.live.measure import Bench
from offmoe.lab.live.results import Configuration, Measured
from offmoe.plan import DEFAULT_POLICY

BUDGETS = ("25%", "50%", "75%", "100%")
POLICIES = tuple(dict.fromkeys((str(DEFAULT_POLICY), "crf:h=16", "lru", "lfru")))[:3]
Progress = Callable[[str, int, int], None]  # (description, number done, total)


@dataclass(frozen=True)
class Sweep:
    """Budgets × methods; the first method of a budget is its baseline."""

    budgets: dict[str, list[Configuration]]  # by budget, baseline first
    rounds: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, bench: Bench, vram: tuple[str, ...], policies: tuple[str, ...], prefetch: tuple[str, ...], rounds: int
    ) -> Sweep:
        """Return all combinations. Raises OffmoeError before anything is measured if one of them is impossible."""
        notes: list[str] = []
        if not vram:
            vram, note = default_budgets(bench)
            notes += note
        budgets: dict[str, list[Configuration]] = {}
        for budget, policy, prefetcher in product(vram, policies or POLICIES, prefetch or ("none",)):
            configuration = bench.canonical(budget, policy, prefetcher)
            group = budgets.setdefault(configuration.vram, [])
            if bench.plan(configuration).all_in_slots and group:
                notes.append(f"at {configuration.budget} every expert has a slot: only {group[0].method} is measured")
            elif configuration not in group:
                group.append(configuration)
        return cls(budgets, rounds, tuple(dict.fromkeys(notes)))

    @property
    def configurations(self) -> list[Configuration]:
        return [configuration for group in self.budgets.values() for configuration in group]

    def cells(self) -> list[Cell]:
        """Return the measurements round by round, in alternating order.

        A budget's baseline comes first and again last.
        """
        order = []
        for round_index in range(self.rounds):
            for first, *others in list(self.budgets.values())[:: -1 if round_index % 2 else 1]:
                order += [(round_index, one, False) for one in (first, *others[:: -1 if round_index % 2 else 1])]
                order.append((round_index, first, True))
        return [Cell(index, *round_index) for index, round_index in enumerate(order)]


def default_budgets(bench: Bench) -> tuple[tuple[str, ...], list[str]]:
    """Return BUDGETS, with those that are too small replaced by the smallest possible one, and notes about that."""
    smallest = bench.smallest
    fitting = [budget for budget in BUDGETS if float(budget[:-1]) >= smallest]
    if len(fitting) == len(BUDGETS):
        return BUDGETS, []
    note = f"a token is routed to {smallest:g}% of all experts, which is the smallest budget"
    return (f"{smallest:g}%", *fitting), [note]


def run_sweep(bench: Bench, sweep: Sweep, folder: Folder, tokens: int, progress: Progress) -> dict[Cell, Measured]:
    """Make all measurements that are not in the directory yet."""
    results: dict[Cell, Measured] = {}
    missing_traces = {
        round_index for round_index in range(sweep.rounds) if not is_readable(trace_file(folder, round_index))
    }
    for cell in sweep.cells():
        if cell.round in missing_traces:  # repeat the round's first measurement to record the trace
            missing_traces.remove(cell.round)
        elif (found := folder.read(cell)) is not None:
            results[cell] = found
    todo = [cell for cell in sweep.cells() if cell not in results]
    for count, cell in enumerate(todo):
        progress(f"round {cell.round + 1} of {sweep.rounds}, {cell.configuration}", count, len(todo))
        prompts = bench.prompts[cell.round :: sweep.rounds]
        results[cell], trace = bench.measure(cell.configuration, prompts, -(-tokens // sweep.rounds))
        save_trace(trace_file(folder, cell.round), trace)
        folder.write(cell, results[cell])
    progress("measured", len(todo), len(todo))
    return dict(sorted(results.items(), key=lambda item: item[0].index))


def trace_file(folder: Folder, round_index: int) -> Path:
    return folder.path / f"trace-{round_index}.npz"


def is_readable(path: Path) -> bool:
    try:
        Trace.load(path)
    except ValueError:
        return False
    return True


def save_trace(path: Path, trace: Trace) -> None:
    """Save the trace of a round unless it exists: greedy routing is the same in every configuration."""
    if not is_readable(path):
        try:
            trace.save(path)
        except OSError as error:
            raise OffmoeError(f"cannot write {path}: {error.strerror}") from error


def join_traces(folder: Folder, rounds: int) -> Trace:
    """Return the traces of all rounds, concatenated."""
    parts = [Trace.load(trace_file(folder, round_index)) for round_index in range(rounds)]
    ends = np.cumsum([0, *(len(part.experts) for part in parts)])
    offsets = np.concatenate([[0], *(part.offsets[1:] + end for part, end in zip(parts, ends, strict=False))])
    no_prompts = {"prefill": None, "prefill_offsets": None, "prefill_probs": None, "prefill_tokens": None}
    return replace(
        parts[0],
        experts=np.concatenate([part.experts for part in parts]),
        offsets=offsets,
        probs=None,
        tokens=None,
        meta={key: parts[0].meta[key] for key in ("model", "layers", "experts", "top_k")},
        **no_prompts,
    )
