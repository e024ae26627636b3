"""`offmoe trace …`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offmoe.app.options import Command, check_overwrite, json_option, option, parse_options, placement_options
from offmoe.app.terminal import clean, interruptible, progress_bar
from offmoe.checkpoint.find_model import find_model
from offmoe.errors import OffmoeError, users_mistakes

if TYPE_CHECKING:
    from offmoe.cache.trace import Trace

RECORD = (
    "offmoe trace record --built-in --tokens 4000 -o demo.npz",
    "offmoe trace record model.gguf --vram 8GiB --prompts prompts.txt --tokens 2000 -o t.npz",
    "offmoe trace record demo --built-in --states -o states.npz",
)
INFO = "offmoe trace info t.npz", "offmoe trace info t.npz --plot t.png", "offmoe trace info t.npz --json"
CONVERT = (
    "offmoe trace convert t.npz t.csv",
    "offmoe trace convert routing.csv t.npz --experts 128",
    "offmoe trace convert t.npz t.jsonl",
)
FIT = "offmoe trace fit states.npz -o map.npz", "offmoe trace fit states.npz --ahead 2 --test other.npz -o map.npz"
recorded, output, fitting = partial(option, "Recording"), partial(option, "Output"), partial(option, "Fitting")
force_option = output("--force", is_flag=True, help="Write over what is there.")


@click.group()
def trace() -> None:
    """Record which experts a model chooses, and look at it."""


@trace.command(cls=Command, examples=RECORD)
@click.argument("model", default="demo")
@recorded("--prompts", type=click.Path(path_type=Path), metavar="FILE",
          help="One a line; a .jsonl has objects with prompt, text (raw) or messages, and perhaps class.")  # fmt: skip
@recorded("--built-in", is_flag=True, help="Prompts of many kinds that come with offmoe.")
@recorded("--tokens", type=click.IntRange(1), default=4000, show_default=True, metavar="N", help="Decoded, in all.")
@recorded("--states", is_flag=True, help="What the routers see, float16, and their logits: for `trace fit`. Large.")
@recorded("--ids-only", is_flag=True, help="Without the routers' weights: a third of the size.")
@recorded("--temperature", type=float, metavar="T", help="0 always takes the likeliest token.")
@recorded("--seed", type=int, metavar="N", help="Of the first round; later ones count up [0].")
@output("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="T.npz", help="The trace.")
@force_option
@placement_options
def record(
    model: str,
    prompts: Path | None,
    built_in: bool,
    tokens: int,
    states: bool,
    ids_only: bool,
    out: Path,
    force: bool,
    **chosen: Any,
) -> None:
    """Let MODEL (default: the demo) answer prompts, and keep its routing.

    Where the prompts end before N tokens are decoded, they are asked again with another seed. Ctrl-C keeps what is
    there.
    """
    if (prompts is None) == (not built_in):
        raise click.UsageError("Give either --prompts FILE or --built-in.")
    settings, sampling = parse_options({**chosen, "greedy": False})
    may_write(out, force, ".npz")
    path = find_model(model)
    from offmoe.app.cli import load
    from offmoe.lab.trace.prompts import BUILT_IN, read_prompts
    from offmoe.lab.trace.record import Recording

    asked = read_prompts(prompts) if prompts else BUILT_IN
    with load(path, settings) as engine:
        recording = Recording(engine, asked, sampling, states=states, weights=not ids_only)
        with progress_bar("tokens") as progress, interruptible(recording.stop):
            recording.run(tokens, lambda done: progress("tokens", min(done, tokens), tokens))
        found = recording.trace()
        found.save(out)
    click.echo(clean(f"{out}: {len(found.experts)} tokens of {found.sequences} answers"))
    if recording.stopped:
        raise KeyboardInterrupt


@trace.command(cls=Command, examples=INFO)
@click.argument("path", type=click.Path(path_type=Path), metavar="T.npz")
@output("--plot", type=click.Path(path_type=Path), metavar="PNG", help="Draw it.")
@json_option
def info(path: Path, plot: Path | None, as_json: bool) -> None:
    """How uneven a model's routing is, how stable, and whether its experts specialise."""
    found = read(path)
    from offmoe.lab.trace.info import as_dict, examine
    from offmoe.lab.trace.table import tables

    facts = examine(found)
    if plot:
        from offmoe.lab.trace.plot import draw

        with users_mistakes():
            plot.write_bytes(draw(facts))
    if as_json:
        from offmoe.app.cli import print_json

        print_json(as_dict(facts))
    else:
        from offmoe.app.terminal import console

        console().print(*tables(facts), sep="\n")


@trace.command(cls=Command, examples=CONVERT)
@click.argument("source", type=click.Path(path_type=Path), metavar="IN")
@click.argument("out", type=click.Path(path_type=Path))
@output("--model", metavar="NAME", help="Of a trace whose file does not name its model.")
@output("--experts", type=click.IntRange(1, 65535), metavar="N", help="A layer, likewise [the highest id + 1].")
@force_option
def convert(source: Path, out: Path, model: str | None, experts: int | None, force: bool) -> None:
    """Another format, by suffix: .npz, .csv (a line a routed event) or .jsonl (a line a token).

    CSV and JSON keep ids, weights and sequences; states, logits and tokens stay behind.
    """
    may_write(out, force, ".npz", ".csv", ".jsonl")
    with users_mistakes():
        from offmoe.lab.trace.formats import read_any, write_any

        write_any(read_any(source, model, experts), out)


@trace.command(cls=Command, examples=FIT)
@click.argument("path", type=click.Path(path_type=Path), metavar="T.npz")
@fitting("--ahead", type=click.IntRange(1, 4), default=1, show_default=True, metavar="D",
         help="Layers from state to router.")  # fmt: skip
@fitting("--ridge", type=float, metavar="L", help="Penalty [the best of six on a quarter of the training sequences].")
@fitting("--test", type=click.Path(path_type=Path), metavar="T2.npz",
         help="Judge on this trace [a quarter of T.npz's sequences, not trained on].")  # fmt: skip
@output("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="MAP.npz", help="The map.")
@json_option
@force_option
def fit(path: Path, ahead: int, ridge: float | None, test: Path | None, out: Path, as_json: bool, force: bool) -> None:
    """Learn to predict a router D layers before it, from a trace with --states.

    For `--prefetch linear:map=MAP.npz`. Judged on sequences that it did not see, beside gate-ahead and a control.
    """
    may_write(out, force, ".npz")
    train, other = read(path), read(test) if test else None
    from offmoe.lab.trace.fit import fit_map, judge_table

    with users_mistakes():
        linear = fit_map(train, other, ahead, ridge)
        linear.save(out)
    if as_json:
        from offmoe.app.cli import print_json

        print_json(linear.meta)
    else:
        from offmoe.app.terminal import console

        console().print(*judge_table(linear), sep="\n")


def read(path: Path) -> Trace:
    with users_mistakes():
        from offmoe.cache.trace import Trace

        return Trace.load(path)


def may_write(out: Path, force: bool, *suffixes: str) -> None:
    """Found out before minutes of work."""
    if out.suffix not in suffixes:
        raise OffmoeError(f"{out} ends with {out.suffix or 'no suffix'!r}: expected {' or '.join(suffixes)}")
    check_overwrite(out, force)
    if not out.parent.is_dir():
        raise OffmoeError(f"{out.parent} is no directory: make it, or choose another name")
