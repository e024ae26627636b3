"""The rows of `bench policies` as tables."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from offmoe.app.terminal import clean

Row = dict[str, Any]
PERCENT, PLAIN = "{:.1%}".format, "{:.2f}".format
COLUMNS = (
    ("hit", "hit_rate", PERCENT),
    ("first 64", "hit_rate_first_64", PERCENT),
    ("after", "hit_rate_after_64", PERCENT),
    ("misses", "misses_per_token", PLAIN),
    ("uploads", "uploads_per_token", PLAIN),
    ("gap", "gap_captured", PERCENT),
    ("coverage", "coverage", PERCENT),
    ("precision", "precision", PERCENT),
    ("timely", "timely", PERCENT),
    ("wasted", "wasted_per_token", PLAIN),
    ("polluted", "pollution_per_token", PLAIN),
    ("stall ms", "stall_ms_per_token", PLAIN),
)
CAPTION = (
    "misses, uploads, wasted and polluted are records a token, stall ms a token; gap: from lru (0 %) to belady (100 %)"
)


def tables(rows: list[Row]) -> list[RenderableType]:
    """One a trace, and one more a budget where the layers are wanted."""
    made: list[RenderableType] = []
    for (name, model, tokens), some in groupby(rows, lambda row: (row["trace"], row["model"], row["tokens"])):
        of_trace = list(some)
        made += [Text(clean(f"{name}: {model}, {tokens} tokens"), "bold"), policies_table(of_trace)]
        if "hit_rate_by_layer" in of_trace[0]:
            made += [layers_table(list(group)) for _, group in groupby(of_trace, pool)]
    return [*made, Text(CAPTION, "dim")]


def pool(row: Row) -> tuple[str, int]:
    return row["scope"], row["slots"]


def policies_table(rows: list[Row]) -> Table:
    """A line a row, budgets apart; columns in which nothing stands are left out."""
    ahead = any(row["prefetch"] != "none" for row in rows)
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for name in ("scope", "slots", "policy", *(["prefetch"] if ahead else []), *(head for head, *_ in columns)):
        words = name in ("scope", "policy", "prefetch")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for _, group in groupby(rows, pool):
        table.add_section()
        budget = list(group)
        best = max(row["hit_rate"] for row in budget if not row["policy"].startswith("belady"))
        for row in budget:
            who = [row["scope"], str(row["slots"]), row["policy"], *([row["prefetch"]] if ahead else [])]
            cells = ["–" if row.get(key) is None else show(row[key]) for _, key, show in columns]
            style = "dim" if row["policy"].startswith("belady") else "bold" if row["hit_rate"] == best else ""
            table.add_row(*(Text(clean(cell)) for cell in who + cells), style=style)
    return table


def layers_table(rows: list[Row]) -> Table:
    """A line a layer, a column a policy."""
    table = Table(title=f"hit rate by layer, {rows[0]['scope']} {rows[0]['slots']}", box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for row in rows:
        head = row["policy"] if row["prefetch"] == "none" else f"{row['policy']} {row['prefetch']}"
        table.add_column(Text(clean(head)), justify="right")
    for layer, rates in enumerate(zip(*(row["hit_rate_by_layer"] for row in rows), strict=True)):
        table.add_row(str(layer), *map(PERCENT, rates))
    return table
