"""`offmoe bench …`."""

from __future__ import annotations

import click

from offmoe.options import LazyGroup


@click.group(
    cls=LazyGroup,
    modules={"policies": "offmoe.lab.policies_cli", "latency": "offmoe.lab.latency_cli"},
)
def bench() -> None:
    """Measure cache and prefetch policies: replayed on a trace, or live."""
