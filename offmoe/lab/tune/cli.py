"""Command `offmoe tune`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from offmoe.app.options import Command, Number, option
from offmoe.app.profile import profile_path
from offmoe.app.terminal import progress_bar
from offmoe.checkpoint.find_model import find_model
from offmoe.errors import OffmoeError
from offmoe.settings import Settings

EXAMPLES = (
    "offmoe tune demo --vram 50%",
    "offmoe tune model.gguf --vram 8GiB --minutes 20",
    "offmoe tune demo --forget",
)
tuning, placement = partial(option, "Tuning"), partial(option, "Placement")


TUNE_HELP = """Find the fastest settings for MODEL on this machine.

Policies, prefetchers and their thresholds are compared with the defaults, which stay unless something is faster by
more than the noise of the measurements. The result is saved as a profile, which chat and run use."""


@click.command(cls=Command, examples=EXAMPLES, help=TUNE_HELP)
@click.argument("model", default="demo")
@tuning("--minutes", type=Number(0.1, 1440), default=5.0, show_default=True, help="Time limit in minutes.")
@tuning(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of prompts, as for `trace record`, instead of the built-in ones.",
)
@tuning("--forget", is_flag=True, help="Delete MODEL's profile instead of measuring.")
@placement(
    "--vram",
    metavar="SIZE|P%",
    help="Size of the VRAM budget for experts, e.g. 8GiB or 50%; the profile applies to this budget only.",
)
@placement("--ram", metavar="SIZE", help="Size of the pinned host memory for experts; the rest is read from disk.")
@placement("--device", metavar="NAME", help="Device to run on: cpu, cuda or cuda:N.")
def tune(model: str, minutes: float, prompts: Path | None, forget: bool, vram: str | None, **others: Any) -> None:
    settings, path = Settings.of(vram=vram, **others), find_model(model)
    if forget:
        from offmoe.lab.tune import halving as lab

        deleted = lab.forget(path)
        click.echo(f"deleted {deleted}" if deleted else f"there is no profile of {path.name} on this machine")
        return
    from offmoe.lab.live.folder import check_writable, write_file
    from offmoe.lab.live.prompts import load_prompts
    from offmoe.lab.tune.halving import profile_text
    from offmoe.lab.tune.halving import tune as find_fastest

    try:
        target: Path | None = profile_path(path)
    except OffmoeError as error:
        target = None
        click.echo(f"no profile will be saved: {error}", err=True)
    if target:
        check_writable(target.parent)  # fail now, not after minutes of measuring
    with progress_bar("tuning") as progress:
        verdict = find_fastest(
            path,
            settings,
            vram,
            load_prompts(prompts),
            minutes,
            lambda step, spent: progress(step, int(spent), int(60 * minutes)),
        )
    if target:
        write_file(target, profile_text(path, verdict))
    click.echo(f"{verdict.why}" if verdict.chosen else f"the defaults stay: {verdict.why}")
    if target:
        click.echo(f"profile: {target}")
