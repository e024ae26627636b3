"""`offmoe trace …`."""

from __future__ import annotations

import click


@click.group()
def trace() -> None:
    """Record which experts a model chooses, and look at it."""
