"""Command `offmoe bench policies`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from offmoe.app.options import Command, Number, option

EXAMPLES = (
    "offmoe bench policies trace.npz",
    "offmoe bench policies trace.npz --slots 8 --slots 16 --policy crf:h=16 --policy ./mine.py:MyPolicy,h=64",
    "offmoe bench policies trace.npz --fraction 0.25 --scope layer --scope global --csv table.csv",
    "offmoe bench policies states.npz --policy lru --prefetch gate --prefetch shuffled:gate --prefetch oracle",
)
cache_option, prefetch_option, output_option = (
    partial(option, "Cache"),
    partial(option, "Prefetching"),
    partial(option, "Output"),
)
FILE = click.Path(path_type=Path, dir_okay=False)


POLICIES_HELP = """Replay traces through cache policies and prefetchers.

All k experts of a layer are looked up before any is admitted, as in the engine and by its own table. gap: share of
the difference between lru and belady that a policy gains."""


@click.command(cls=Command, examples=EXAMPLES, help=POLICIES_HELP)
@click.argument("traces", nargs=-1, required=True, type=FILE, metavar="TRACE.npz…")
@cache_option("--slots", multiple=True, type=click.IntRange(1), metavar="N", help="Slots per layer. May be repeated.")
@cache_option(
    "--fraction",
    "fractions",
    multiple=True,
    type=Number(0, 1, min_open=True),
    metavar="F",
    help="Slots as a share of a layer's experts. May be repeated. [default: 0.25, 0.5]",
)
@cache_option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME[:KEY=VALUE,…]",
    help="Cache policy: a name, or FILE.py:CLASS,… May be repeated; lru and belady are always included. "
    "[default: a selection]",
)
@cache_option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["layer", "global"]),
    help="N slots for each layer, or one pool of N × layers. May be repeated. [default: layer]",
)
@cache_option("--tokens", type=click.IntRange(1), metavar="N", help="Use only the first N tokens of every trace.")
@prefetch_option(
    "--prefetch",
    multiple=True,
    metavar="NAME[:KEY=VALUE,…]",
    help="Prefetcher: none, previous, markov, nearest, gate, linear, oracle, shuffled:…, or FILE.py:CLASS,… "
    "May be repeated. [default: none]",
)
@prefetch_option(
    "--link",
    metavar="SIZE",
    help="Bandwidth of copies to slots in bytes/s, or `measure`; if not given, copies take no time.",
)
@prefetch_option("--record", metavar="SIZE", help="Size of one expert, for --link and for results in bytes.")
@prefetch_option(
    "--floor", type=Number(0), default=0.0, metavar="MS", help="Time of a token in which every expert hits."
)
@output_option("--per-layer", is_flag=True, help="Also print the hit rate of every layer.")
@output_option("--csv", type=FILE, metavar="FILE", help="Also write the table to FILE.")
@output_option("--force", is_flag=True, help="Overwrite an existing file.")
@output_option("--json", "as_json", is_flag=True, help="Print one JSON object per line instead of the table.")
def policies(**chosen: Any) -> None:
    from offmoe.lab.policies.sweep import run

    run(**chosen)
