"""`offmoe bench latency`."""

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
WRONG = 3  # exit status: the replay does not agree with the engine
sweep, placing, output = partial(option, "Sweep"), partial(option, "Placement"), partial(option, "Output")


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("model", default="demo")
@sweep("--vram", multiple=True, metavar="SIZE|P%", help="For expert slots; may be repeated [25%, 50%, 75%, 100%].")
@sweep("--policy", "policies", multiple=True, metavar="NAME[:KEY=VALUE]",
       help="May be repeated, the first is the baseline [the default, lru, …].")  # fmt: skip
@sweep("--prefetch", multiple=True, metavar="NAME[:KEY=VALUE,…]", help="May be repeated; on a GPU [none].")
@sweep("--tokens", type=click.IntRange(5), default=384, show_default=True, help="Decoded a configuration.")
@sweep("--rounds", type=click.IntRange(1, 99), help="Turns of all configurations [5, on a GPU 3].")
@sweep("--prompts", type=click.Path(path_type=Path), metavar="FILE",
       help="As for `trace record`, instead of the built-in ones.")  # fmt: skip
@placing("--ram", metavar="SIZE", help="Pinned memory for records; what is beyond stays on disk.")
@placing("--scope", type=click.Choice(["layer", "global"]), help="A quota a layer, or one pool.")
@placing("--device", metavar="NAME", help="cpu, cuda or cuda:N.")
@placing("--dtype", type=click.Choice(["f32", "bf16", "f16"]), help="Of activations, trunk and KV.")
@placing("--chunk", type=int, metavar="N", help="Tokens of a prompt that are run at once.")
@output("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="DIR",
        help="For the report; what is there of the same run is not measured again.")  # fmt: skip
def latency(model: str, out: Path, **chosen: Any) -> int:
    """Hit rate against latency, measured in the engine on this machine.

    MODEL (default: the demo) answers real prompts in every combination of --vram, --policy and --prefetch, in turns.
    """
    path = find_model(model)
    from offmoe.lab.live.run import measure_and_report

    return 0 if measure_and_report(path, out, chosen) else WRONG
