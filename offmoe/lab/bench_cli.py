"""Command group `offmoe bench`."""

from __future__ import annotations

import click

from offmoe.app.options import LazyGroup


@click.group(
    cls=LazyGroup,
    modules={"policies": "offmoe.lab.policies.cli", "latency": "offmoe.lab.live.cli"},
)
def bench() -> None:
    """Measure cache policies and prefetchers, on recorded traces or in the engine."""
