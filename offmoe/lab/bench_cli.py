"""Command group `offmoe bench`."""

from __future__ import annotations

import click

from offmoe.app.options import LazyGroup

BENCH_HELP = "Measure cache policies and prefetchers, on recorded traces or in the engine."


@click.group(
    cls=LazyGroup,
    modules={"policies": "offmoe.lab.policies.cli", "latency": "offmoe.lab.live.cli"},
    help=BENCH_HELP,
)
def bench() -> None: ...
