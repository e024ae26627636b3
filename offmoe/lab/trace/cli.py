"""Commands `offmoe trace …`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offmoe.app.options import Command, Number, json_option, option, parse_options, placement_options
from offmoe.app.signals import interruptible
from offmoe.app.terminal import clean, progress_bar
from offmoe.cache.files import check_output, whole_file
from offmoe.checkpoint.find_model import find_model
from offmoe.errors import users_mistakes

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
recording_option, output_option, fit_option = (
    partial(option, "Recording"),
    partial(option, "Output"),
    partial(option, "Fitting"),
)
force_option = output_option("--force", is_flag=True, help="Overwrite an existing file.")


TRACE_HELP = "Record which experts a model chooses, and analyse it."


@click.group(help=TRACE_HELP)
def trace() -> None: ...


RECORD_HELP = """Record the routing of MODEL (default: the demo) while it answers prompts.

If the prompts end before N tokens are decoded, they are repeated with another seed. Ctrl-C saves the trace so far."""


@trace.command(cls=Command, examples=RECORD, help=RECORD_HELP)
@click.argument("model", default="demo")
@recording_option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of prompts, one per line; in a .jsonl, objects with prompt, text (raw) or messages, optionally class.",
)
@recording_option("--built-in", is_flag=True, help="Use the prompts that come with offmoe.")
@recording_option(
    "--tokens",
    type=click.IntRange(1),
    default=4000,
    show_default=True,
    metavar="N",
    help="Total number of tokens to decode.",
)
@recording_option(
    "--states",
    is_flag=True,
    help="Also record the routers' inputs (float16) and logits, for `trace fit`; the file gets large.",
)
@recording_option("--ids-only", is_flag=True, help="Record no router weights, for a third of the size.")
@recording_option(
    "--temperature", type=float, metavar="T", help="Sampling temperature; 0 always picks the most likely token."
)
@recording_option(
    "--seed", type=int, metavar="N", help="Seed of the first round, incremented in later rounds. [default: 0]"
)
@output_option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="T.npz", help="Output file.")
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
    if (prompts is None) == (not built_in):
        raise click.UsageError("Give either --prompts FILE or --built-in.")
    settings, sampling = parse_options({**chosen, "greedy": False})
    path = find_model(model)
    with users_mistakes():
        check_output(out, force, ".npz")
    from offmoe.app.cli import load
    from offmoe.lab.trace.prompts import BUILT_IN, read_prompts
    from offmoe.lab.trace.record import Recording

    asked = read_prompts(prompts) if prompts else BUILT_IN
    with load(path, settings) as engine:
        recording = Recording(engine, asked, sampling, states=states, weights=not ids_only)
        with progress_bar("tokens") as progress, interruptible(recording.stop):
            recording.run(tokens, lambda done: progress("tokens", min(done, tokens), tokens))
        recorded = recording.trace()
        with users_mistakes():
            recorded.save(out)
    click.echo(clean(f"{out}: {len(recorded.experts)} tokens of {recorded.sequences} answers"))
    if recording.stopped:
        raise KeyboardInterrupt


INFO_HELP = "Show how uneven and how stable a model's routing is, and whether its experts specialise."


@trace.command(cls=Command, examples=INFO, help=INFO_HELP)
@click.argument("path", type=click.Path(path_type=Path), metavar="T.npz")
@output_option("--plot", type=click.Path(path_type=Path), metavar="PNG", help="Also draw the results to this file.")
@force_option
@json_option
def info(path: Path, plot: Path | None, force: bool, as_json: bool) -> None:
    if plot:
        with users_mistakes():
            check_output(plot, force)
    recorded = read(path)
    from offmoe.lab.trace.info import as_dict, examine
    from offmoe.lab.trace.table import tables

    facts = examine(recorded)
    if plot:
        from offmoe.lab.trace.plot import draw

        with users_mistakes(), whole_file(plot) as file:
            file.write(draw(facts))
    if as_json:
        from offmoe.app.run import print_json

        print_json(as_dict(facts))
    else:
        from offmoe.app.terminal import console

        console().print(*tables(facts), sep="\n")


CONVERT_HELP = """Convert a trace to the format of OUT's suffix: .npz, .csv (one line per token and layer) or .jsonl
(one line per token).

CSV and JSON keep ids, weights and sequences, but not states, logits and token ids."""


@trace.command(cls=Command, examples=CONVERT, help=CONVERT_HELP)
@click.argument("source", type=click.Path(path_type=Path), metavar="IN")
@click.argument("out", type=click.Path(path_type=Path))
@output_option("--model", metavar="NAME", help="Name of the model, if the file does not say.")
@output_option(
    "--experts",
    type=click.IntRange(1, 65535),
    metavar="N",
    help="Experts per layer, if the file does not say. [default: the highest id + 1]",
)
@force_option
def convert(source: Path, out: Path, model: str | None, experts: int | None, force: bool) -> None:
    with users_mistakes():
        check_output(out, force, ".npz", ".csv", ".jsonl")
        from offmoe.lab.trace.formats import read_any, write_any

        write_any(read_any(source, model, experts), out)


FIT_HELP = """Learn to predict a router D layers ahead, from a trace recorded with --states.

The map is used with `--prefetch linear:map=MAP.npz`. It is evaluated on held-out sequences and compared with
gate-ahead and controls."""


@trace.command(cls=Command, examples=FIT, help=FIT_HELP)
@click.argument("path", type=click.Path(path_type=Path), metavar="T.npz")
@fit_option(
    "--ahead",
    type=click.IntRange(1, 4),
    default=1,
    show_default=True,
    metavar="D",
    help="Number of layers to predict ahead.",
)
@fit_option(
    "--ridge",
    type=Number(),
    metavar="L",
    help="Penalty of the ridge regression. [default: the best of six on a quarter of the training sequences]",
)
@fit_option(
    "--test",
    type=click.Path(path_type=Path),
    metavar="T2.npz",
    help="Trace to evaluate on. [default: a quarter of T.npz's sequences, held out]",
)
@output_option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="MAP.npz", help="Output file.")
@json_option
@force_option
def fit(path: Path, ahead: int, ridge: float | None, test: Path | None, out: Path, as_json: bool, force: bool) -> None:
    with users_mistakes():
        check_output(out, force, ".npz")
    train, other = read(path), read(test) if test else None
    from offmoe.lab.trace.fit import evaluation_table, fit_map

    with users_mistakes():
        linear = fit_map(train, other, ahead, ridge)
        linear.save(out)
    if as_json:
        from offmoe.app.run import print_json

        print_json(linear.meta)
    else:
        from offmoe.app.terminal import console

        console().print(*evaluation_table(linear), sep="\n")


def read(path: Path) -> Trace:
    """Load a trace. Raises OffmoeError."""
    with users_mistakes():
        from offmoe.cache.trace import Trace

        return Trace.load(path)
