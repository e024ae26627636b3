"""What `offmoe bench latency` does: check, measure, replay, report."""

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
from offmoe.lab.live.prompts import prompts_of
from offmoe.lab.live.sweep import Sweep, run_sweep, traces
from offmoe.lab.report.markdown import table, wrong_line
from offmoe.lab.report.numbers import Results, fitted, gains, summaries
from offmoe.lab.report.predictors import Predictions, keep, kept, predictions
from offmoe.lab.report.write import write_report
from offmoe.plan import pick_device
from offmoe.prefetch import NONE
from offmoe.settings import Settings

STATES = 160  # tokens whose hidden states are recorded for predictors
PLACEMENT = ("ram", "scope", "device", "dtype", "chunk")


def measure_and_report(path: Path, out: Path, chosen: dict[str, Any]) -> bool:
    """`chosen`: the command's options. False where a replay does not agree with the engine."""
    if find_spec("matplotlib") is None:  # now, not after minutes of measuring
        raise OffmoeError("plots need matplotlib: pip install 'offmoe[lab]'")
    settings = Settings.of(**{name: chosen[name] for name in PLACEMENT})
    prompts, tokens = prompts_of(chosen["prompts"]), chosen["tokens"]
    rounds = chosen["rounds"] or (5 if pick_device(settings.device).type == "cpu" else 3)
    if len(prompts) < rounds:
        raise OffmoeError(f"{rounds} rounds need as many prompts and there are {len(prompts)}: give fewer --rounds")
    with Bench(path, settings, prompts, tokens) as bench:
        sweep = Sweep.of(bench, chosen["vram"], chosen["policies"], chosen["prefetch"], rounds)
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
        results = measured(bench, sweep, folder, tokens)
        about = {
            **run,
            "notes": sweep.notes,
            "date": date.today().isoformat(),
            "bandwidths": bench.bandwidths(),
            "record_bytes": bench.model.record_bytes / bench.model.records,
            "records": bench.model.records,
        }
        predicted = kept(folder) or predictors(bench, results, folder, about)
    write_report(folder, about, results, traces(folder, rounds), predicted)
    return show(results, out, sweep.notes)


def measured(bench: Bench, sweep: Sweep, folder: Folder, tokens: int) -> Results:
    """With a bar that shows the time left; Ctrl-C says what is kept."""
    total = len(sweep.cells())
    try:
        with progress_bar("measuring") as progress:
            results = run_sweep(bench, sweep, folder, tokens, progress)
    except KeyboardInterrupt:
        kept = sum(folder.read(cell) is not None for cell in sweep.cells())
        click.echo(f"offmoe: {kept} of {total} measurements are kept: the same command goes on", err=True)
        raise
    finally:
        for broken in folder.broken:
            click.echo(f"offmoe: {broken} was damaged: measured again", err=True)
    return results


def predictors(bench: Bench, results: Results, folder: Folder, about: dict[str, Any]) -> Predictions | None:
    """At the smallest budget that leaves room to fetch ahead; None where none does."""
    config, found = bench.model.config, summaries(results)
    roomy = [s for s in found if config.top_k + 1 < s.slots // config.moe_layers < config.experts]
    if not roomy:
        return None
    own = min(roomy, key=lambda summary: summary.slots)
    pace = Pace(
        about["record_bytes"] / about["bandwidths"]["link"],
        min(m.floor_ms for m in own.rounds) / 1e3 / config.moe_layers,
    )
    with progress_bar("predictors") as progress:
        trace = bench.states(replace(own.configuration, prefetch=NONE), min(about["tokens"], STATES))
        of = predictions(trace, own.configuration.policy, own.slots // config.moe_layers, about["scope"], pace,
                         lambda done, total: progress("predictors", done, total))  # fmt: skip
    predicted = Predictions(own.configuration.budget, own.configuration.policy, len(trace.experts), tuple(of))
    keep(folder, predicted)
    return predicted


def show(results: Results, out: Path, notes: tuple[str, ...]) -> bool:
    """The table, and whether every replay agrees."""
    found, compared = summaries(results), gains(results)
    screen = console()
    screen.print(table(found, compared))
    for note in notes:
        screen.print(note, style="dim", soft_wrap=True)
    if one := fitted(found):
        screen.print(f"ms a token = {one} (residual {one.residual:.2f} ms)")
    wrong = [summary for summary in found if not summary.believed]
    for summary in wrong:
        screen.print(f"the replay is wrong: {wrong_line(summary)}", style="bold red", soft_wrap=True)
    screen.print(f"report: {out / 'report.md'}", soft_wrap=True)
    return not wrong
