"""`offmoe bench latency`."""

from __future__ import annotations

import click


@click.command()
def latency() -> None:
    """Hit rate against latency, measured in the engine on this machine."""
