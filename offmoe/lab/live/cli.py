"""Command `offmoe bench latency`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from offmoe.app.options import Command, option
from offmoe.checkpoint.find_model import find_model

EXAMPLES = (
    "offmoe bench latency -o results",
    "offmoe bench latency model.gguf --vram 4GiB --vram 8GiB --policy crf:h=16 --policy lru -o results",
    "offmoe bench latency model.gguf --prefetch none --prefetch gate:d=1,p=0.05 -o results",
)
REPLAY_DISAGREES = 3  # exit status
sweep_option, placement_option, output_option = (
    partial(option, "Sweep"),
    partial(option, "Placement"),
    partial(option, "Output"),
)


LATENCY_HELP = """Measure hit rate against latency in the engine on this machine.

MODEL (default: the demo) answers real prompts in every combination of --vram, --policy and --prefetch, in
interleaved rounds."""


@click.command(cls=Command, examples=EXAMPLES, help=LATENCY_HELP)
@click.argument("model", default="demo")
@sweep_option(
    "--vram",
    multiple=True,
    metavar="SIZE|P%",
    help="Size of the VRAM budget for experts. May be repeated. [default: 25%, 50%, 75%, 100%]",
)
@sweep_option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME[:KEY=VALUE]",
    help="Cache policy. May be repeated; the first is the baseline. [default: the default policy, lru, …]",
)
@sweep_option(
    "--prefetch",
    multiple=True,
    metavar="NAME[:KEY=VALUE,…]",
    help="Prefetcher (GPU only). May be repeated. [default: none]",
)
@sweep_option(
    "--tokens",
    type=click.IntRange(5),
    default=384,
    show_default=True,
    help="Number of tokens to decode per configuration.",
)
@sweep_option(
    "--rounds", type=click.IntRange(1, 99), help="Number of rounds over all configurations. [default: 5, on a GPU 3]"
)
@sweep_option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of prompts, as for `trace record`, instead of the built-in ones.",
)
@placement_option(
    "--ram", metavar="SIZE", help="Size of the pinned host memory for experts; the rest is read from disk."
)
@placement_option(
    "--scope",
    type=click.Choice(["layer", "global"]),
    help="Share the slots equally among layers, or use one pool for all.",
)
@placement_option("--device", metavar="NAME", help="Device to run on: cpu, cuda or cuda:N.")
@placement_option(
    "--dtype",
    type=click.Choice(["f32", "bf16", "f16"]),
    help="Data type of activations, non-expert weights and KV cache.",
)
@placement_option("--chunk", type=int, metavar="N", help="Number of prompt tokens processed at once.")
@output_option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Directory of the report; results of the same run that it already has are reused.",
)
def latency(model: str, out: Path, **chosen: Any) -> int:
    path = find_model(model)
    from offmoe.lab.live.run import measure_and_report

    return 0 if measure_and_report(path, out, chosen) else REPLAY_DISAGREES
