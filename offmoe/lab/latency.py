"""What `offmoe bench latency` does: check, measure, replay, report."""

from __future__ import annotations

from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from offmoe import __version__
from offmoe.errors import OffmoeError
from offmoe.lab.live import WARM_UP, Bench
from offmoe.lab.live_folder import Folder
from offmoe.lab.live_prompts import read_prompts
from offmoe.lab.live_sweep import Sweep, run_sweep, traces
from offmoe.lab.report_markdown import table, wrong_line
from offmoe.lab.report_numbers import Results, fitted, gains, summaries
from offmoe.lab.report_write import write_report
from offmoe.plan import pick_device
from offmoe.profile import machine_name, model_key
from offmoe.settings import Settings
from offmoe.terminal import console, progress_bar

PLACEMENT = ("ram", "scope", "device", "dtype", "chunk")


def measure_and_report(path: Path, out: Path, chosen: dict[str, Any]) -> bool:
    """`chosen`: the command's options. False where a replay does not agree with the engine."""
    if find_spec("matplotlib") is None:  # now, not after minutes of measuring
        raise OffmoeError("plots need matplotlib: pip install 'offmoe[lab]'")
    settings = Settings.of(**{name: chosen[name] for name in PLACEMENT})
    prompts, tokens = read_prompts(chosen["prompts"]), chosen["tokens"]
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
            "prompts": prompts,
            "configurations": [str(configuration) for configuration in sweep.configurations],
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
            "predictors": ["On the CPU nothing is prefetched: there is no prediction to judge in a live run."],
        }
    write_report(folder, about, results, traces(folder, rounds))
    return show(results, out)


def measured(bench: Bench, sweep: Sweep, folder: Folder, tokens: int) -> Results:
    """With a bar that shows the time left; Ctrl-C says what is kept."""
    total = len(sweep.cells())
    try:
        with progress_bar("measuring") as progress:
            results = run_sweep(bench, sweep, folder, tokens, lambda done, todo: progress("measuring", done, todo))
    except KeyboardInterrupt:
        kept = sum(folder.read(cell) is not None for cell in sweep.cells())
        click.echo(f"offmoe: {kept} of {total} measurements are kept: the same command goes on", err=True)
        raise
    finally:
        for broken in folder.broken:
            click.echo(f"offmoe: {broken} was damaged: measured again", err=True)
    return results


def show(results: Results, out: Path) -> bool:
    """The table, and whether every replay agrees."""
    found, compared = summaries(results), gains(results)
    screen = console()
    screen.print(table(found, compared))
    if one := fitted(found):
        screen.print(f"ms a token = {one} (residual {one.residual:.2f} ms)")
    wrong = [summary for summary in found if not summary.believed]
    for summary in wrong:
        screen.print(f"the replay is wrong: {wrong_line(summary)}", style="bold red", soft_wrap=True)
    screen.print(f"report: {out / 'report.md'}", soft_wrap=True)
    return not wrong
