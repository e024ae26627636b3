"""A run as text: report.md for people, latency.csv for programs, a table for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from offmoe.lab.live.truth import TOLERANCE
from offmoe.lab.report.numbers import Fit, Gain, Results, Summary, drifts, fitted, gains, summaries

if TYPE_CHECKING:
    from rich.table import Table

Rows = list[list[str]]
CSV = ("round", "again", "vram", "policy", "prefetch", "slots", "tokens", "prompts", "ms", "hit_rate",
       "simulated", "same_misses", "covered", "late", "misses", "uploads", "stall_ms", "roof_ms", "roof",
       "prompt_tok_s")  # fmt: skip


def as_csv(results: Results) -> str:
    """A line a measurement; parts of a token's time in columns of their own."""
    parts = list(dict.fromkeys(name for measured in results.values() for name in measured.parts))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV, *(f"{part}_ms" for part in parts)])
    for cell, measured in results.items():
        values = {name: getattr(measured, name, None) for name in CSV} | {"round": cell.round, "again": cell.again}
        numbers = [*values.values(), *(measured.parts.get(part) for part in parts)]
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in numbers])
    return out.getvalue()


def markdown(rows: Rows, header: Sequence[str]) -> str:
    """A table; numbers to the right."""
    align = [":--" if index == 0 else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), align, *rows])


def verdicts(found: list[Gain]) -> list[str]:
    """One sentence a comparison; what does not stand out of the spread is called noise."""
    lines = []
    for gain in found:
        who, base = f"At {gain.configuration.budget}, {gain.configuration.method}", gain.baseline.method
        if gain.noise:
            lines.append(f"{who} against {base}: **noise** ({gain.figures}).")
        else:
            lines.append(f"{who} takes {'less' if gain.gain > 0 else 'more'} time than {base} ({gain.figures}).")
    return lines


HEADER = ("configuration", "slots", "ms a token", "rounds", "tok/s", "hit rate", "replayed", "misses", "uploads",
          "roof, ms", "against the baseline")  # fmt: skip


def rows(found: list[Summary], compared: list[Gain]) -> Rows:
    """The table of configurations. Replayed is what the simulator says of the same routing."""
    by = {gain.configuration: gain for gain in compared}
    return [
        [
            str(summary.configuration),
            str(summary.slots),
            f"{summary.ms:.2f}",
            "{:.2f} … {:.2f}".format(*summary.range),
            f"{1e3 / summary.ms:.1f}",
            f"{summary.mean('hit_rate'):.2%}",
            replayed(summary),
            f"{summary.mean('misses'):.1f}",
            f"{summary.mean('uploads'):.1f}",
            f"{summary.typical.roof_ms:.2f}",
            str(by[summary.configuration]) if summary.configuration in by else "baseline",
        ]
        for summary in found
    ]


def replayed(summary: Summary) -> str:
    if summary.simulated is None:
        return "–"
    return f"{summary.simulated:.2%}"


def truth(found: list[Summary]) -> list[str]:
    """Whether the replay is to be believed, in Markdown; what is not is bold."""
    checked = [summary for summary in found if summary.simulated is not None]
    wrong = [summary for summary in checked if not summary.believed]
    lines = [f"**{wrong_line(summary)}**" for summary in wrong]
    if wrong:
        lines.append("**No number of a replay is to be believed here, the miss curves included.**")
    elif checked:
        worst = max(measured.off for summary in checked for measured in summary.rounds)
        lines.append(
            f"Measured and replayed hit rates differ by at most {100 * worst:.2f} points "
            f"(allowed: {100 * TOLERANCE:g}) in {sum(len(s.rounds) for s in checked)} measurements."
        )
    seen = [summary.same_misses for summary in checked if summary.same_misses is not None]
    if seen:
        same = sum(seen)
        lines.append(
            f"The same records missed in the same order in {same} of {len(seen)} configurations."
            if same == len(seen)
            else f"**Other records missed, or in another order, in {len(seen) - same} of {len(seen)} configurations.**"
        )
    unchecked = [str(summary.configuration) for summary in found if summary.simulated is None]
    if unchecked:
        lines.append(f"Not replayed, for predictions are not recorded in a live run: {', '.join(unchecked)}.")
    return lines


def wrong_line(summary: Summary) -> str:
    off = max(summary.rounds, key=lambda measured: measured.off)
    return (
        f"{summary.configuration}: measured {off.hit_rate:.2%}, replayed {off.simulated:.2%}: "
        f"more than {100 * TOLERANCE:g} point apart"
    )


def report(about: dict[str, Any], results: Results, figures: dict[str, str], predictors: list[str]) -> str:
    """report.md. `figures`: file by caption; `predictors`: paragraphs about prediction."""
    found, compared = summaries(results), gains(results)
    first = [m for cell, m in results.items() if cell.configuration == found[0].configuration and not cell.again]
    tokens, prompts = sum(m.tokens for m in first), sum(m.prompts for m in first)
    blocks = [
        f"# {about['model']}: hit rate against latency",
        f"{about['machine']} · {about['device']} · offmoe {about['version']} · {about['date']}",
        f"{len(found)} configurations, {tokens} decoded tokens each on {prompts} prompts through the chat template, "
        f"greedy, in {about['rounds']} interleaved rounds. Each time a configuration starts with an empty cache, "
        f"warmed by {about['warm_up']} tokens of another answer and by its prompts.",
        *(f"Note: {note}." for note in about["notes"]),
        "## What came out",
        "\n".join(f"- {line}" for line in verdicts(compared)) or "One method a budget: there is nothing to compare.",
        "ms a token, its parts and roof are the median round's; a gain is the median of the rounds' pairs. It counts "
        "where it is larger than its spread (95 %): the larger of what the pairs scatter and of what the baseline, "
        "measured first and again last in each round, differs from itself.",
        markdown(rows(found, compared), HEADER),
        *(f"![{caption}]({file})" for caption, file in list(figures.items())[:2]),
        "## Is the replay right?",
        *truth(found),
        "## ms a token = A + B · misses + C · uploads",
        fit_text(fitted(found), len(found)),
        "## Where misses come from",
        *(f"![{caption}]({file})" for caption, file in list(figures.items())[2:4]),
        "## Prediction",
        *predictors[:2],
        *(f"![{caption}]({file})" for caption, file in list(figures.items())[4:]),
        *predictors[2:],
        "## The baseline, repeated last",
        markdown([drift_row(drift.configuration, drift.changes) for drift in drifts(results)],
                 ("baseline", "again ÷ first − 1, round by round", "mean")),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def drift_row(configuration: object, changes: Sequence[float]) -> list[str]:
    return [
        str(configuration), ", ".join(f"{change:+.1%}" for change in changes), f"{sum(changes) / len(changes):+.1%}",
    ]  # fmt: skip


def fit_text(one: Fit | None, configurations: int) -> str:
    if one is None:
        return f"Not fitted: {configurations} configurations, and at least 5 are needed."
    text = f"ms a token = {one}; residual {one.residual:.2f} ms (RMS over {one.points} configurations, least squares)."
    if one.c is None:
        text += " Every miss was an upload and every upload a miss, so B holds the cost of both."
    return text


def table(found: list[Summary], compared: list[Gain]) -> Table:
    """For the terminal; a replay that is off stands out in red."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False)
    for index, name in enumerate(HEADER):
        shown.add_column(name, justify="left" if index in (0, len(HEADER) - 1) else "right")
    for summary, row in zip(found, rows(found, compared), strict=True):
        cells = [Text(value) for value in row]
        if not summary.believed:
            cells[6].stylize("bold red")
        if row[-1].endswith("noise"):
            cells[-1].stylize("dim")
        shown.add_row(*cells)
    return shown
