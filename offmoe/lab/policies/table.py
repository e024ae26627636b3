"""Tables of the rows of `bench policies`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from offmoe.app.terminal import clean

Row = dict[str, Any]
PERCENT, NUMBER = "{:.1%}".format, "{:.2f}".format
COLUMNS = (
    ("hit", "hit_rate", PERCENT),
    ("first 64", "hit_rate_first_64", PERCENT),
    ("after", "hit_rate_after_64", PERCENT),
    ("misses", "misses_per_token", NUMBER),
    ("uploads", "uploads_per_token", NUMBER),
    ("gap", "gap_captured", PERCENT),
    ("coverage", "coverage", PERCENT),
    ("precision", "precision", PERCENT),
    ("timely", "timely", PERCENT),
    ("wasted", "wasted_per_token", NUMBER),
    ("polluted", "pollution_per_token", NUMBER),
    ("stall ms", "stall_ms_per_token", NUMBER),
)
CAPTION = (
    "misses, uploads, wasted and polluted: experts per token; stall: ms per token; "
    "gap: from lru (0 %) to belady (100 %)"
)


def tables(rows: list[Row]) -> list[RenderableType]:
    """Return a table for each trace, and one for each number of slots if hit rates by layer were requested."""
    result: list[RenderableType] = []
    for (name, model, tokens), group in groupby(rows, lambda row: (row["trace"], row["model"], row["tokens"])):
        trace_rows = list(group)
        result += [Text(clean(f"{name}: {model}, {tokens} tokens"), "bold"), policies_table(trace_rows)]
        if "hit_rate_by_layer" in trace_rows[0]:
            result += [layers_table(list(same_pool)) for _, same_pool in groupby(trace_rows, pool)]
    return [*result, Text(CAPTION, "dim")]


def pool(row: Row) -> tuple[str, int]:
    return row["scope"], row["slots"]


def policies_table(rows: list[Row]) -> Table:
    """Return a table with one line per row, grouped by slots; empty columns are left out."""
    ahead = any(row["prefetch"] != "none" for row in rows)
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for name in ("scope", "slots", "policy", *(["prefetch"] if ahead else []), *(head for head, *_ in columns)):
        is_text = name in ("scope", "policy", "prefetch")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for _, group in groupby(rows, pool):
        table.add_section()
        budget = list(group)
        best = max(row["hit_rate"] for row in budget if not row["policy"].startswith("belady"))
        for row in budget:
            names = [row["scope"], str(row["slots"]), row["policy"], *([row["prefetch"]] if ahead else [])]
            cells = ["–" if row.get(key) is None else show(row[key]) for _, key, show in columns]
            style = "dim" if row["policy"].startswith("belady") else "bold" if row["hit_rate"] == best else ""
            table.add_row(*(Text(clean(cell)) for cell in names + cells), style=style)
    return table


def layers_table(rows: list[Row]) -> Table:
    """Return a table with one line per layer and one column per policy."""
    table = Table(title=f"hit rate by layer, {rows[0]['scope']} {rows[0]['slots']}", box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for row in rows:
        head = row["policy"] if row["prefetch"] == "none" else f"{row['policy']} {row['prefetch']}"
        table.add_column(Text(clean(head)), justify="right")
    for layer, rates in enumerate(zip(*(row["hit_rate_by_layer"] for row in rows), strict=True)):
        table.add_row(str(layer), *map(PERCENT, rates))
    return table
