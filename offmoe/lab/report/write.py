"""Puts a run's results into its folder: CSV, figures, report."""

from __future__ import annotations

from typing import Any

from offmoe.cache.trace import Trace
from offmoe.lab.live.folder import Folder, write_file
from offmoe.lab.report import plots
from offmoe.lab.report.curves import curves
from offmoe.lab.report.markdown import as_csv, report
from offmoe.lab.report.numbers import Results, summaries
from offmoe.lab.report.predictors import Predictions, paragraphs


def write_report(
    folder: Folder, about: dict[str, Any], results: Results, trace: Trace, predicted: Predictions | None
) -> None:
    """`about`: the run's facts (model, machine, …, bandwidths, record_bytes, records, scope). Raises OffmoeError."""
    found = summaries(results)
    baselines = list(dict.fromkeys(cell.configuration for cell in results if cell.again))
    policies = list(dict.fromkeys(summary.configuration.policy for summary in found))
    budgets = {baseline.budget: next(s.slots for s in found if s.configuration == baseline) for baseline in baselines}
    lines = curves(trace, policies, about["scope"])
    shares = {budget: slots / about["records"] for budget, slots in budgets.items()}
    drawn = {
        "Hit rate against ms a token": (
            "latency.png", plots.latency(found, about["bandwidths"], about["record_bytes"])
        ),
        "Where a token's time goes": ("stack.png", plots.stack(found)),
        "Hit rate by layer": ("layers.png", plots.layers(found, baselines)),
        "Misses over cache size": ("misses.png", plots.miss_curves(lines, shares, plots.looks(found))),
    }  # fmt: skip
    if predicted:
        drawn["Prefetch: coverage against precision"] = "predictors.png", plots.prefetch(predicted)
    for file, content in drawn.values():
        write_file(folder.path / file, content)
    write_file(folder.path / "latency.csv", as_csv(results))
    figures = {caption: file for caption, (file, _) in drawn.items()}
    write_file(folder.path / "report.md", report(about, results, figures, paragraphs(predicted)))
