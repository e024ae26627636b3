"""`offmoe tune`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from offmoe.app.options import Command, option
from offmoe.app.profile import profile_path
from offmoe.app.terminal import progress_bar
from offmoe.checkpoint.find_model import find_model
from offmoe.settings import Settings

EXAMPLES = (
    "offmoe tune demo --vram 50%",
    "offmoe tune model.gguf --vram 8GiB --minutes 20",
    "offmoe tune demo --forget",
)
tuning, placing = partial(option, "Tuning"), partial(option, "Placement")


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("model", default="demo")
@tuning("--minutes", type=click.FloatRange(0.1, 1440), default=5.0, show_default=True, help="At most so long.")
@tuning(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="As for `trace record`, instead of the built-in ones.",
)
@tuning("--forget", is_flag=True, help="Delete what was found before, and measure nothing.")
@placing("--vram", metavar="SIZE|P%", help="For expert slots: what is found holds for this budget.")
@placing("--ram", metavar="SIZE", help="Pinned memory for records; what is beyond stays on disk.")
@placing("--device", metavar="NAME", help="cpu, cuda or cuda:N.")
def tune(model: str, minutes: float, prompts: Path | None, forget: bool, vram: str | None, **placement: Any) -> None:
    """Find what is fastest here for MODEL, and keep it for chat and run.

    Policies, prefetchers and their thresholds are tried against the default; it stays unless one is faster beyond
    what the measurements scatter.
    """
    settings, path = Settings.of(vram=vram, **placement), find_model(model)
    if forget:
        from offmoe.lab.tune import halving as lab

        gone = lab.forget(path)
        click.echo(f"deleted {gone}" if gone else f"there is no profile of {path.name} on this machine")
        return
    from offmoe.lab.live.folder import check_writable, write_file
    from offmoe.lab.live.prompts import prompts_of
    from offmoe.lab.tune.halving import profile_text
    from offmoe.lab.tune.halving import tune as find_fastest

    target = profile_path(path)
    check_writable(target.parent)  # now, not after minutes of measuring
    with progress_bar("tuning") as progress:
        verdict = find_fastest(
            path, settings, vram, prompts_of(prompts), minutes,
            lambda what, spent: progress(what, int(spent), int(60 * minutes)),
        )  # fmt: skip
    write_file(target, profile_text(path, verdict))
    click.echo(f"{verdict.why}" if verdict.chosen else f"the default stays: {verdict.why}")
    click.echo(f"profile: {target}")
