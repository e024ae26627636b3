"""`offmoe bench policies`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from offmoe.app.options import Command, option

EXAMPLES = (
    "offmoe bench policies trace.npz",
    "offmoe bench policies trace.npz --slots 8 --slots 16 --policy crf:h=16 --policy ./mine.py:MyPolicy,h=64",
    "offmoe bench policies trace.npz --fraction 0.25 --scope layer --scope global --csv table.csv",
    "offmoe bench policies states.npz --policy lru --prefetch gate --prefetch shuffled:gate --prefetch oracle",
)
cache, ahead, output = partial(option, "Cache"), partial(option, "Prefetching"), partial(option, "Output")
FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("traces", nargs=-1, required=True, type=FILE, metavar="TRACE.npz…")
@cache("--slots", multiple=True, type=click.IntRange(1), metavar="N", help="A layer; may be repeated.")
@cache("--fraction", "fractions", multiple=True, type=click.FloatRange(0, 1, min_open=True), metavar="F",
       help="Slots as a share of a layer's experts; may be repeated [0.25, 0.5].")  # fmt: skip
@cache("--policy", "policies", multiple=True, metavar="NAME[:KEY=VALUE,…]",
       help="May be repeated: a name, or FILE.py:CLASS,… [a selection]. lru and belady are always shown.")  # fmt: skip
@cache("--scope", "scopes", multiple=True, type=click.Choice(["layer", "global"]),
       help="A quota a layer, or one pool of N × layers; may be repeated [layer].")  # fmt: skip
@cache("--tokens", type=click.IntRange(1), metavar="N", help="Only the first N of every trace.")
@ahead("--prefetch", multiple=True, metavar="NAME[:KEY=VALUE,…]",
       help="none, previous, markov, nearest, gate, linear, oracle, shuffled:…, FILE.py:CLASS,… [none].")  # fmt: skip
@ahead(
    "--link", metavar="SIZE", help="Bytes a second to where slots are, or `measure`; without it copies take no time."
)
@ahead("--record", metavar="SIZE", help="Bytes of one expert: for --link, and to count in bytes too.")
@ahead("--floor", type=click.FloatRange(0), default=0.0, metavar="MS", help="Of a token in which everything hits.")
@output("--per-layer", is_flag=True, help="The hit rate of every layer too.")
@output("--csv", type=FILE, metavar="FILE", help="Write the table there too.")
@output("--json", "as_json", is_flag=True, help="Print one JSON object a line in place of the table.")
def policies(**chosen: Any) -> None:
    """Replay traces through cache and prefetch policies.

    All k experts of a layer are looked up before any is admitted, as in the engine and by its own table. gap: how much
    of the way from lru to belady a policy goes.
    """
    from offmoe.lab.policies.sweep import run

    run(**chosen)
