"""Write the results of a run into its directory: CSV, figures, report."""

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
    folder: Folder, facts: dict[str, Any], results: Results, trace: Trace, predicted: Predictions | None
) -> None:
    """Write all files. `facts` describe the run (model, machine, …, bandwidths, record_bytes, records, scope).

    Raises OffmoeError.
    """
    found = summaries(results)
    baselines = list(dict.fromkeys(cell.configuration for cell in results if cell.again))
    policies = list(dict.fromkeys(summary.configuration.policy for summary in found))
    budgets = {baseline.budget: next(s.slots for s in found if s.configuration == baseline) for baseline in baselines}
    lines = curves(trace, policies, facts["scope"])
    shares = {budget: slots / facts["records"] for budget, slots in budgets.items()}
    figures = {
        "Hit rate against ms per token": (
            "latency.png",
            plots.latency(found, facts["bandwidths"], facts["record_bytes"]),
        ),
        "Where a token's time goes": ("stack.png", plots.stack(found)),
        "Hit rate by layer": ("layers.png", plots.layers(found, baselines)),
        "Misses over cache size": ("misses.png", plots.miss_curves(lines, shares, plots.method_styles(found))),
    }
    if predicted:
        figures["Prefetch: coverage against precision"] = "predictors.png", plots.prefetch(predicted)
    for file, content in figures.values():
        write_file(folder.path / file, content)
    write_file(folder.path / "latency.csv", as_csv(results))
    files = {caption: file for caption, (file, _) in figures.items()}
    write_file(folder.path / "report.md", report(facts, results, files, paragraphs(predicted)))
