"""Statistics of a trace as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from offmoe.app.terminal import clean
from offmoe.lab.trace.info import LAGS, WINDOWS, Array, Facts

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def tables(facts: Facts) -> list[RenderableType]:
    from rich.text import Text

    meta = facts.meta
    head = (
        f"{meta['model']} · {meta['layers']} layers of {meta['experts']} experts, top {meta['top_k']} · "
        f"{facts.tokens} tokens decoded in {facts.sequences} sequences, {facts.prompt_tokens} prompt tokens"
    )
    return [
        Text(clean(head), "bold"),
        heading("How uneven, layer by layer"),
        by_layer(facts),
        heading("How stable: share of a token's experts that a later token uses too"),
        over_time("tokens later", LAGS, facts.reuse, "{:.1%}"),
        Text(f"by popularity alone {facts.popular.mean():.1%}, at random {facts.uniform:.1%}", "dim"),
        heading("How many different experts a layer uses in a window"),
        over_time("tokens", WINDOWS, facts.working, "{:.1f}"),
        heading("Do experts specialise: information that one of a token's experts gives about its class"),
        specialisation(facts),
    ]


def heading(text: str) -> RenderableType:
    from rich.text import Text

    return Text(f"\n{text}", "bold")


def by_layer(facts: Facts) -> Table:
    from rich.table import Table

    table = Table("layer", box=None, pad_edge=False)
    for name in ("entropy", "hottest quarter", "dead", "reuse +1", "by popularity"):
        table.add_column(name, justify="right")
    columns: list[Any] = [facts.entropy, facts.hottest, facts.dead, facts.reuse[0], facts.popular]
    for layer, row in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *cells(row))
    table.add_row("mean", *cells([np.mean(column) for column in columns]), style="bold")
    return table


def cells(row: Any) -> list[str]:
    entropy, hottest, dead, reuse, popular = row
    again = "–" if np.isnan(reuse) else f"{reuse:.1%}"  # no sequence has two tokens
    return [f"{entropy:.1%}", f"{hottest:.1%}", f"{dead:.3g}", again, f"{popular:.1%}"]


def over_time(label: str, steps: tuple[int, ...], values: Array, form: str) -> Table:
    """Return mean, lowest and highest layer at every step; steps longer than every sequence are left out."""
    from rich.table import Table

    reached = [i for i in range(len(steps)) if not np.isnan(values[i]).any()]
    table = Table(label, box=None, pad_edge=False)
    for i in reached:
        table.add_column(str(steps[i]), justify="right")
    for name, of in (("mean", np.mean), ("lowest layer", np.min), ("highest layer", np.max)):
        table.add_row(name, *(form.format(of(values[i])) for i in reached))
    return table


def specialisation(facts: Facts) -> Table:
    from rich.table import Table

    table = Table("by", "class", "tokens", "bits", "shuffled", "known", "most specialised", box=None, pad_edge=False)
    for classification in facts.classifications:
        bits, control = f"{classification.information.mean():.4f}", f"{classification.control.mean():.4f}"
        table.add_row(classification.name, "", "", bits, control, f"{classification.known.mean():.1%}", style="bold")
        for label, share in zip(classification.labels, classification.shares, strict=True):
            layer, expert, lift = classification.specialist(label)
            text = f"layer {layer}, expert {expert}: {lift:.1f} ×" if lift > 1 else ""
            table.add_row("", clean(label), f"{share:.1%}", "", "", "", text)
    return table
