"""Statistics for people: the dim line after an answer, and the table of /stats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from offmoe.app.chat_store import KeptChat
from offmoe.app.terminal import clean, one_line
from offmoe.settings import format_size
from offmoe.stats.stats import Roof, Stats

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


STATS_MODES = LINE, SHORT, OFF = ("line", "short", "off")
FULL = 0.8  # share of the context from which the user is warned


def stats_line(stats: Stats, ctx: int | None = None, width: int | None = None, mode: str = LINE) -> str:
    """Return one line: 42 tokens · 61.3 tok/s · first 0.21 s · hit 61.2% · 3.6 MiB/token paged · roof 88 tok/s (floor)
    70% · context 12%

    `ctx` are the tokens that the context holds. The least important parts are left out where the line would be wider
    than `width`; the mode `short` has only the most important ones, `off` none.
    """
    parts = {"tokens": f"{stats.tokens} tokens", "speed": f"{stats.decode_tok_s:.1f} tok/s"}
    parts["first"] = f"first {stats.ttft_s:.2f} s"
    parts["hit"] = f"hit {stats.hit_rate:.1%}"
    parts["paged"] = f"{format_size(stats.pcie_bytes_per_token)}/token paged"
    if stats.nvme_bytes_per_token:
        parts["disk"] = f"{format_size(stats.nvme_bytes_per_token)}/token from disk"
    if stats.roof:
        parts["roof"] = f"{roof_text(stats.roof)} {stats.decode_tok_s / stats.roof.tok_s:.0%}"
    if ctx:
        parts["context"] = f"context {context_fill(stats, ctx):.0%}"
    if stats.finish_reason != "stop":
        parts["reason"] = stats.finish_reason
    if mode == SHORT:
        parts = {name: parts[name] for name in ("tokens", "speed", "context", "reason") if name in parts}
    for name in ("disk", "paged", "first", "roof", "hit", "speed", "context", "tokens"):
        if width is not None and len(" · ".join(parts.values())) > width and len(parts) > 1:
            parts.pop(name, None)
    return "" if mode == OFF else " · ".join(parts.values())


def context_fill(stats: Stats, ctx: int) -> float:
    """Return the share of the context that the conversation takes after an answer."""
    return min(1.0, (stats.prompt_tokens + stats.tokens) / ctx)


def cut_note(stats: Stats, text: str, reasoning: str) -> str | None:
    """Return a line for an answer that was cut or has no text, or None. A full context is for the caller to explain."""
    if not text.strip() and stats.finish_reason != "cancelled":
        if reasoning:
            return (
                f"the answer is empty: all {stats.tokens} tokens are reasoning; raise --max-tokens, or try --think off"
            )
        return "the answer is empty: the model ended it at once"
    if stats.finish_reason == "length":
        return f"the answer was cut after {stats.tokens} tokens: --max-tokens allows no more"
    return None


def chats_table(chats: list[KeptChat]) -> RenderableType:
    """Return a table of kept chats."""
    from rich.table import Table
    from rich.text import Text

    if not chats:
        return "no chats are kept yet"
    table = Table("name", "messages", "model", "first message", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for chat in chats:
        table.add_row(chat.name, str(chat.messages), Text(clean(Path(chat.model).name)), Text(one_line(chat.first)))
    return table


def help_table(rows: list[tuple[str, str]]) -> Table:
    """Return a table of names and what they do, without lines."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


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
