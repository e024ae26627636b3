"""`offmoe tune`."""

from __future__ import annotations

import click


@click.command()
def tune() -> None:
    """Find what is fastest here for a model, and keep it."""
