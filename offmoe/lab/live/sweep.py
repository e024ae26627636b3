"""Which measurements a sweep makes, in which order, and how an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from offmoe.cache.trace import Trace
from offmoe.errors import OffmoeError
from offmoe.lab.live.folder import Cell, Folder
from offmoe.lab.live.measure import Bench, Configuration, Measured
from offmoe.plan import DEFAULT_POLICY

BUDGETS = ("25%", "50%", "75%", "100%")
POLICIES = tuple(dict.fromkeys((str(DEFAULT_POLICY), "crf:h=16", "lru", "lfru")))[:3]
Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class Sweep:
    """Budgets × methods; the first method is the baseline of every budget."""

    budgets: dict[str, list[Configuration]]  # by budget, the baseline first
    rounds: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, bench: Bench, vram: tuple[str, ...], policies: tuple[str, ...], prefetch: tuple[str, ...],
           rounds: int) -> Sweep:  # fmt: skip
        """All combinations, checked before anything is measured; OffmoeError for the first that is not possible."""
        notes: list[str] = []
        if not vram:
            vram, note = default_budgets(bench)
            notes += note
        budgets: dict[str, list[Configuration]] = {}
        for budget, policy, ahead in product(vram, policies or POLICIES, prefetch or ("none",)):
            configuration = bench.canonical(budget, policy, ahead)
            among = budgets.setdefault(configuration.vram, [])
            if bench.plan(configuration).all_in_slots and among:
                notes.append(f"at {configuration.budget} every record has a slot: only {among[0].method} is measured")
            elif configuration not in among:
                among.append(configuration)
        return cls(budgets, rounds, tuple(dict.fromkeys(notes)))

    @property
    def configurations(self) -> list[Configuration]:
        return [configuration for among in self.budgets.values() for configuration in among]

    def cells(self) -> list[Cell]:
        """Round by round, the order turned every other time; a budget's baseline comes first and again last."""
        turns = []
        for turn in range(self.rounds):
            for first, *others in list(self.budgets.values())[:: -1 if turn % 2 else 1]:
                turns += [(turn, one, False) for one in (first, *others[:: -1 if turn % 2 else 1])]
                turns.append((turn, first, True))
        return [Cell(index, *turn) for index, turn in enumerate(turns)]


def default_budgets(bench: Bench) -> tuple[tuple[str, ...], list[str]]:
    """BUDGETS, the smallest that works standing in for those that are smaller."""
    smallest = bench.smallest
    fitting = [budget for budget in BUDGETS if float(budget[:-1]) >= smallest]
    if len(fitting) == len(BUDGETS):
        return BUDGETS, []
    note = f"a token is routed to {smallest:g}% of all records: that is the smallest budget"
    return (f"{smallest:g}%", *fitting), [note]


def run_sweep(bench: Bench, sweep: Sweep, folder: Folder, tokens: int, progress: Progress) -> dict[Cell, Measured]:
    """Measure what is not in the folder yet."""
    results: dict[Cell, Measured] = {}
    lost = {turn for turn in range(sweep.rounds) if not readable(trace_file(folder, turn))}
    for cell in sweep.cells():
        if cell.round in lost:  # its first measurement is made again, with the trace
            lost.remove(cell.round)
        elif (found := folder.read(cell)) is not None:
            results[cell] = found
    todo = [cell for cell in sweep.cells() if cell not in results]
    for count, cell in enumerate(todo):
        progress(f"round {cell.round + 1} of {sweep.rounds}, {cell.configuration}", count, len(todo))
        prompts = bench.prompts[cell.round :: sweep.rounds]
        results[cell], trace = bench.measure(cell.configuration, prompts, -(-tokens // sweep.rounds))
        keep_trace(trace_file(folder, cell.round), trace)
        folder.write(cell, results[cell])
    progress("measured", len(todo), len(todo))
    return dict(sorted(results.items(), key=lambda item: item[0].index))


def trace_file(folder: Folder, turn: int) -> Path:
    return folder.path / f"trace-{turn}.npz"


def readable(path: Path) -> bool:
    try:
        Trace.load(path)
    except ValueError:
        return False
    return True


def keep_trace(path: Path, trace: Trace) -> None:
    """Greedy routing is the same in every configuration: one a round is enough."""
    if not readable(path):
        try:
            trace.save(path)
        except OSError as error:
            raise OffmoeError(f"cannot write {path}: {error.strerror}") from error


def traces(folder: Folder, rounds: int) -> Trace:
    """Of all rounds, one behind the other."""
    parts = [Trace.load(trace_file(folder, turn)) for turn in range(rounds)]
    ends = np.cumsum([0, *(len(part.experts) for part in parts)])
    offsets = np.concatenate([[0], *(part.offsets[1:] + end for part, end in zip(parts, ends, strict=False))])
    alone = {"prefill": None, "prefill_offsets": None, "prefill_probs": None, "prefill_tokens": None}
    return replace(
        parts[0], experts=np.concatenate([part.experts for part in parts]), offsets=offsets, probs=None, tokens=None,
        meta={key: parts[0].meta[key] for key in ("model", "layers", "experts", "top_k")}, **alone,
    )  # fmt: skip
