"""Statistics for people: the dim line after an answer, and the table of /stats."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from offmoe.app.terminal import clean
from offmoe.settings import format_size
from offmoe.stats.stats import Roof, Stats

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def stats_line(stats: Stats) -> str:
    """Return one line: 42 tokens · 61.3 tok/s · first 0.21 s · hit 61.2% · 3.6 MiB/token paged · roof 88 tok/s (floor)
    70%
    """
    parts = [f"{stats.tokens} tokens", f"{stats.decode_tok_s:.1f} tok/s", f"first {stats.ttft_s:.2f} s"]
    parts.append(f"hit {stats.hit_rate:.1%}")
    parts.append(f"{format_size(stats.pcie_bytes_per_token)}/token paged")
    if stats.nvme_bytes_per_token:
        parts.append(f"{format_size(stats.nvme_bytes_per_token)}/token from disk")
    if stats.roof:
        parts.append(f"{roof_text(stats.roof)} {stats.decode_tok_s / stats.roof.tok_s:.0%}")
    if stats.finish_reason != "stop":
        parts.append(stats.finish_reason)
    return " · ".join(parts)


def roof_text(roof: Roof) -> str:
    return f"roof {roof.tok_s:.0f} tok/s ({roof.limit})"


def total(answers: list[Stats], name: str) -> float:
    """Return the sum of a field over all answers."""
    return float(sum(getattr(answer, name) for answer in answers))


def mean_per_token(answers: list[Stats], name: str) -> float:
    """Return the mean of a field, weighted by the answers' numbers of tokens."""
    weighted = sum(float(getattr(answer, name)) * answer.tokens for answer in answers)
    return weighted / (total(answers, "tokens") or 1)


def mean_per_answer(answers: list[Stats], name: str) -> float:
    """Return the mean of a field, each answer counted once."""
    return total(answers, name) / len(answers)


def decode_speed(answers: list[Stats], name: str) -> float:
    """Return the tokens of all answers per second of decoding."""
    seconds = sum(answer.tokens / answer.decode_tok_s for answer in answers if answer.decode_tok_s)
    return total(answers, "tokens") / seconds if seconds else 0.0


ROWS: list[tuple[str, str, Callable[[list[Stats], str], float], Callable[[float], str]]] = [
    ("tokens", "tokens", total, "{:.0f}".format),
    ("prompt tokens", "prompt_tokens", total, "{:.0f}".format),
    ("… of them reused from the KV cache", "reused_tokens", total, "{:.0f}".format),
    ("decode, tok/s", "decode_tok_s", decode_speed, "{:.1f}".format),
    ("first token, s", "ttft_s", mean_per_answer, "{:.2f}".format),
    ("hit rate", "hit_rate", mean_per_token, "{:.1%}".format),
    ("covered", "covered", mean_per_token, "{:.1%}".format),
    ("late", "late", mean_per_token, "{:.1%}".format),
    ("misses per token", "misses_per_token", mean_per_token, "{:.1f}".format),
    ("paged in per token", "pcie_bytes_per_token", mean_per_token, format_size),
    ("read from disk per token", "nvme_bytes_per_token", mean_per_token, format_size),
    ("… of it experts", "nvme_record_bytes_per_token", mean_per_token, format_size),
    ("stalled per token, ms", "stall_ms_per_token", mean_per_token, "{:.2f}".format),
]


def stats_table(answers: list[Stats]) -> Table:
    """Return a table of the last answer next to all answers of the session."""
    from rich.table import Table

    last = answers[-1]
    table = Table("", "this answer", f"all {len(answers)}", box=None, pad_edge=False)
    for label, name, combine, show in ROWS:
        table.add_row(label, show(getattr(last, name)), show(combine(answers, name)))
    table.add_row("roof", f"{roof_text(last.roof)}: {last.roof.source}" if last.roof else "nothing decoded")
    table.add_row("policy", last.policy)
    table.add_row("expert slots", format_size(last.vram_bytes))
    table.add_row("RAM tier", format_size(last.ram_bytes))
    return table


def section_tables(sections: dict[str, list[tuple[str, str]]]) -> list[RenderableType]:
    """Return a heading and a borderless table for each section."""
    from rich.table import Table
    from rich.text import Text

    tables: list[RenderableType] = []
    for heading, rows in sections.items():
        table = Table(show_header=False, box=None, padding=(0, 2))
        for label, value in rows:
            table.add_row(label, Text(clean(value)))
        tables += [Text(heading, "bold"), table]
    return tables
