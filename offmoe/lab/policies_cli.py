"""`offmoe bench policies`."""

from __future__ import annotations

import click


@click.command()
def policies() -> None:
    """Replay traces through cache and prefetch policies."""
