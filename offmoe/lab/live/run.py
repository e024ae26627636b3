"""Steps of `offmoe bench latency`: check, measure, replay, report."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from offmoe import __version__
from offmoe.app.profile import machine_name, model_key
from offmoe.app.terminal import console, progress_bar
from offmoe.cache.ahead import Pace
from offmoe.errors import OffmoeError
from offmoe.lab.live.folder import Folder
from offmoe.lab.live.measure import WARM_UP, Bench
from offmoe.lab.live.prompts import load_prompts
from offmoe.lab.live.sweep import Sweep, join_traces, run_sweep
from offmoe.lab.report.markdown import disagreement, table
from offmoe.lab.report.numbers import Results, fit_summaries, gains, summaries
from offmoe.lab.report.predictors import Predictions, load_predictions, predictions, save_predictions
from offmoe.lab.report.write import write_report
from offmoe.plan import pick_device
from offmoe.prefetch import NONE
from offmoe.settings import Settings

STATES = 160  # number of tokens whose hidden states are recorded for predictors
PLACEMENT = ("ram", "scope", "device", "dtype", "chunk")


def measure_and_report(path: Path, out: Path, options: dict[str, Any]) -> bool:
    """Run the command with its `options`; return False if a replay does not agree with the engine."""
    if find_spec("matplotlib") is None:  # fail now, not after minutes of measuring
        raise OffmoeError("plots need matplotlib: pip install 'offmoe[lab]'")
    settings = Settings.of(**{name: options[name] for name in PLACEMENT})
    prompts, tokens = load_prompts(options["prompts"]), options["tokens"]
    rounds = options["rounds"] or (5 if pick_device(settings.device).type == "cpu" else 3)
    if len(prompts) < rounds:
        raise OffmoeError(
            f"{rounds} rounds need at least as many prompts, and there are {len(prompts)}: give fewer --rounds"
        )
    with Bench(path, settings, prompts, tokens) as bench:
        sweep = Sweep.of(bench, options["vram"], options["policies"], options["prefetch"], rounds)
        plan = bench.plan(sweep.configurations[0])
        run = {
            "what": "bench latency",
            "version": __version__,
            "model": path.name,
            "model_key": model_key(path),
            "machine": machine_name(),
            "device": str(plan.device),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "scope": plan.scope,
            "ram": settings.ram,
            "chunk": plan.chunk,
            "tokens": tokens,
            "rounds": rounds,
            "warm_up": WARM_UP,
            "prompts": [vars(prompt) for prompt in prompts],
            "configurations": [vars(configuration) for configuration in sweep.configurations],
        }
        folder = Folder(out, run)
        results = measure_all(bench, sweep, folder, tokens)
        facts = {
            **run,
            "notes": sweep.notes,
            "date": date.today().isoformat(),
            "bandwidths": bench.bandwidths(),
            "record_bytes": bench.model.record_bytes / bench.model.records,
            "records": bench.model.records,
        }
        predicted = load_predictions(folder) or replay_predictors(bench, results, folder, facts)
    write_report(folder, facts, results, join_traces(folder, rounds), predicted)
    return print_results(results, out, sweep.notes)


def measure_all(bench: Bench, sweep: Sweep, folder: Folder, tokens: int) -> Results:
    """Run the sweep behind a progress bar; Ctrl-C prints how many measurements are saved."""
    total = len(sweep.cells())
    try:
        with progress_bar("measuring") as progress:
            results = run_sweep(bench, sweep, folder, tokens, progress)
    except KeyboardInterrupt:
        saved = sum(folder.read(cell) is not None for cell in sweep.cells())
        click.echo(f"offmoe: {saved} of {total} measurements are saved: run the same command to continue", err=True)
        raise
    finally:
        for broken in folder.broken:
            click.echo(f"offmoe: {broken} was damaged and is measured again", err=True)
    return results


def replay_predictors(bench: Bench, results: Results, folder: Folder, facts: dict[str, Any]) -> Predictions | None:
    """Replay predictors at the smallest budget that leaves room for prefetching; return None if there is none."""
    config, configurations = bench.model.config, summaries(results)
    candidates = [s for s in configurations if config.top_k + 1 < s.slots // config.moe_layers < config.experts]
    if not candidates:
        return None
    own = min(candidates, key=lambda summary: summary.slots)
    pace = Pace(
        facts["record_bytes"] / facts["bandwidths"]["link"],
        min(m.floor_ms for m in own.rounds) / 1e3 / config.moe_layers,
    )
    with progress_bar("predictors") as progress:
        trace = bench.states(replace(own.configuration, prefetch=NONE), min(facts["tokens"], STATES))
        of = predictions(
            trace,
            own.configuration.policy,
            own.slots // config.moe_layers,
            facts["scope"],
            pace,
            lambda done, total: progress("predictors", done, total),
        )
    predicted = Predictions(own.configuration.budget, own.configuration.policy, len(trace.experts), tuple(of))
    save_predictions(folder, predicted)
    return predicted


def print_results(results: Results, out: Path, notes: tuple[str, ...]) -> bool:
    """Print the results; return whether every replay agrees with the engine."""
    configurations, compared = summaries(results), gains(results)
    screen = console()
    screen.print(table(configurations, compared))
    for note in notes:
        screen.print(note, style="dim", soft_wrap=True)
    if one := fit_summaries(configurations):
        screen.print(f"ms per token = {one} (residual {one.residual:.2f} ms)")
    wrong = [summary for summary in configurations if not summary.agrees]
    for summary in wrong:
        screen.print(f"the replay disagrees: {disagreement(summary)}", style="bold red", soft_wrap=True)
    screen.print(f"report: {out / 'report.md'}", soft_wrap=True)
    return not wrong
