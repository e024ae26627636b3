"""A run as text: report.md for people, latency.csv for programs, a table for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from offmoe.lab.live.truth import TOLERANCE
from offmoe.lab.report.numbers import Fit, Gain, Results, Summary, drifts, fit_summaries, gains, summaries

if TYPE_CHECKING:
    from rich.table import Table

Rows = list[list[str]]
CSV = (
    "round",
    "again",
    "vram",
    "policy",
    "prefetch",
    "slots",
    "tokens",
    "prompts",
    "ms",
    "hit_rate",
    "simulated",
    "same_misses",
    "covered",
    "late",
    "misses",
    "uploads",
    "stall_ms",
    "roof_ms",
    "roof",
    "prompt_tok_s",
)


def as_csv(results: Results) -> str:
    """Return one line per measurement; the parts of a token's time have columns of their own."""
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
    """Return a Markdown table with numbers aligned to the right."""
    align = [":--" if index == 0 else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), align, *rows])


def verdicts(found: list[Gain]) -> list[str]:
    """Return one sentence per comparison; a difference within its spread is called noise."""
    lines = []
    for gain in found:
        subject, base = f"At {gain.configuration.budget}, {gain.configuration.method}", gain.baseline.method
        if gain.noise:
            lines.append(f"{subject} against {base}: **noise** ({gain.figures}).")
        else:
            lines.append(f"{subject} takes {'less' if gain.gain > 0 else 'more'} time than {base} ({gain.figures}).")
    return lines


HEADER = (
    "configuration",
    "slots",
    "ms per token",
    "rounds",
    "tok/s",
    "hit rate",
    "replayed",
    "misses",
    "uploads",
    "roof, ms",
    "against the baseline",
)


def rows(found: list[Summary], compared: list[Gain]) -> Rows:
    """Return the table of configurations. "replayed" is the simulator's hit rate for the same routing."""
    by = {gain.configuration: gain for gain in compared}
    return [
        [
            str(summary.configuration),
            str(summary.slots),
            f"{summary.ms:.2f}",
            "{:.2f} … {:.2f}".format(*summary.range),
            f"{1e3 / summary.ms:.1f}",
            f"{summary.mean('hit_rate'):.2%}",
            replayed_text(summary),
            f"{summary.mean('misses'):.1f}",
            f"{summary.mean('uploads'):.1f}",
            f"{summary.typical.roof_ms:.2f}",
            str(by[summary.configuration]) if summary.configuration in by else "baseline",
        ]
        for summary in found
    ]


def replayed_text(summary: Summary) -> str:
    if summary.simulated is None:
        return "–"
    return f"{summary.simulated:.2%}"


def agreement(found: list[Summary]) -> list[str]:
    """Return, in Markdown, how well the replay agrees with the engine; disagreements are bold."""
    checked = [summary for summary in found if summary.simulated is not None]
    disagreeing = [summary for summary in checked if not summary.agrees]
    lines = [f"**{disagreement(summary)}**" for summary in disagreeing]
    if disagreeing:
        lines.append("**No result of a replay can be trusted here, including the miss curves.**")
    elif checked:
        worst = max(measured.replay_error for summary in checked for measured in summary.rounds)
        lines.append(
            f"Measured and replayed hit rates differ by at most {100 * worst:.2f} points "
            f"(allowed: {100 * TOLERANCE:g}) in {sum(len(s.rounds) for s in checked)} measurements."
        )
    seen = [summary.same_misses for summary in checked if summary.same_misses is not None]
    if seen:
        same = sum(seen)
        lines.append(
            f"The same experts missed in the same order in {same} of {len(seen)} configurations."
            if same == len(seen)
            else f"**Other experts missed, or in another order, in {len(seen) - same} of {len(seen)} configurations.**"
        )
    unchecked = [str(summary.configuration) for summary in found if summary.simulated is None]
    if unchecked:
        lines.append(f"Not replayed, because a live run does not record predictions: {', '.join(unchecked)}.")
    return lines


def disagreement(summary: Summary) -> str:
    """Return a sentence about the round whose replay is furthest from its measurement."""
    replay_error = max(summary.rounds, key=lambda measured: measured.replay_error)
    return (
        f"{summary.configuration}: measured {replay_error.hit_rate:.2%}, replayed {replay_error.simulated:.2%}: "
        f"more than {100 * TOLERANCE:g} point apart"
    )


def report(facts: dict[str, Any], results: Results, figures: dict[str, str], predictors: list[str]) -> str:
    """Return report.md. `figures` maps captions to files; `predictors` are paragraphs about prediction."""
    found, compared = summaries(results), gains(results)
    first = [m for cell, m in results.items() if cell.configuration == found[0].configuration and not cell.again]
    tokens, prompts = sum(m.tokens for m in first), sum(m.prompts for m in first)
    blocks = [
        f"# {facts['model']}: hit rate against latency",
        f"{facts['machine']} · {facts['device']} · offmoe {facts['version']} · {facts['date']}",
        f"{len(found)} configurations, {tokens} decoded tokens each on {prompts} prompts through the chat template, "
        f"greedy, in {facts['rounds']} interleaved rounds. Each time a configuration starts with an empty cache, "
        f"warmed by {facts['warm_up']} tokens of another answer and by its prompts.",
        *(f"Note: {note}." for note in facts["notes"]),
        "## Results",
        "\n".join(f"- {line}" for line in verdicts(compared))
        or "Each budget has only one method: there is nothing to compare.",
        "ms per token, its parts and the roof are those of the median round; a gain is the median over the rounds' "
        "pairs. It counts if it is larger than its spread (95 %): the larger of the scatter of the pairs and of the "
        "difference of the baseline, measured first and again last in each round, from itself.",
        markdown(rows(found, compared), HEADER),
        *(f"![{caption}]({file})" for caption, file in list(figures.items())[:2]),
        "## Does the replay agree?",
        *agreement(found),
        "## ms per token = A + B · misses + C · uploads",
        fit_text(fit_summaries(found), len(found)),
        "## Where misses come from",
        *(f"![{caption}]({file})" for caption, file in list(figures.items())[2:4]),
        "## Prediction",
        *predictors[:2],
        *(f"![{caption}]({file})" for caption, file in list(figures.items())[4:]),
        *predictors[2:],
        "## The baseline, repeated last",
        markdown(
            [drift_row(drift.configuration, drift.changes) for drift in drifts(results)],
            ("baseline", "again ÷ first − 1, round by round", "mean"),
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def drift_row(configuration: object, changes: Sequence[float]) -> list[str]:
    return [
        str(configuration),
        ", ".join(f"{change:+.1%}" for change in changes),
        f"{sum(changes) / len(changes):+.1%}",
    ]


def fit_text(one: Fit | None, configurations: int) -> str:
    if one is None:
        return f"Not fitted: {configurations} configurations, and at least 5 are needed."
    text = (
        f"ms per token = {one}; residual {one.residual:.2f} ms (RMS over {one.points} configurations, least squares)."
    )
    if one.c is None:
        text += " Every miss was an upload and every upload a miss, so B holds the cost of both."
    return text


def table(found: list[Summary], compared: list[Gain]) -> Table:
    """Return the table for the terminal; a replay that disagrees is red."""
    from rich.table import Table
    from rich.text import Text

    result = Table(box=None, pad_edge=False)
    for index, name in enumerate(HEADER):
        result.add_column(name, justify="left" if index in (0, len(HEADER) - 1) else "right")
    for summary, row in zip(found, rows(found, compared), strict=True):
        cells = [Text(value) for value in row]
        if not summary.agrees:
            cells[6].stylize("bold red")
        if row[-1].endswith("noise"):
            cells[-1].stylize("dim")
        result.add_row(*cells)
    return result
