"""Command line. Options and the model's path are checked before torch is imported, which takes a second."""

from __future__ import annotations

import gc
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offmoe import __version__
from offmoe.app.options import (
    Command,
    LazyGroup,
    chat_options,
    file_option,
    json_option,
    option,
    parse_options,
    placement_options,
    plain_option,
    profile_option,
    raw_option,
    reasoning_option,
    sampling_options,
    stats_option,
    system_option,
    think_option,
)
from offmoe.app.profile import apply_profile
from offmoe.app.report import section_tables
from offmoe.app.run import build_prompt, print_answer, print_json, read_prompt
from offmoe.app.signals import Terminated, terminable
from offmoe.app.terminal import clean, console, one_line, progress_bar
from offmoe.cache.files import check_output
from offmoe.checkpoint.find_model import find_model
from offmoe.errors import OffmoeError, users_mistakes
from offmoe.machine.gc_pause import gc_paused
from offmoe.settings import Settings

if TYPE_CHECKING:
    from offmoe.engine import Engine

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
# Texts of --help are arguments and no docstrings, which `python -OO` drops.
HELP = """Chat with a mixture-of-experts model that does not fit in your GPU's memory.

MODEL is a .gguf file, a directory of safetensors, a Hugging Face name (org/name, or org/name:Q4_K_M to select one GGUF
of several), or demo, the small model that comes with offmoe."""
CHAT = "offmoe chat", "offmoe chat model.gguf --vram 8GiB", "offmoe chat -c", "echo 'Hello!' | offmoe chat --greedy"
RUN_HELP = """Print MODEL's answer to PROMPT, or to standard input.

If PROMPT is given and standard input is a file or a pipe, the answer is to both: PROMPT, a blank line, the input."""
RUN = (
    "offmoe run demo 'Why is the sky blue?'",
    "offmoe run demo 'Summarise this.' < report.txt",
    "offmoe run model.gguf --json --greedy < prompt.txt",
    "offmoe run org/name:Q4_K_M 'Once upon a time' --raw --max-tokens 100",
)
DOCTOR_HELP = """Check what this machine offers, and what keeps offmoe from using it.

The disk that holds MODEL (default: the demo) is measured."""
DOCTOR = "offmoe doctor", "offmoe doctor /models/model.gguf --json"
INFO = (
    "offmoe info",
    "offmoe info model.gguf --vram 8GiB --ram 16GiB",
    "offmoe info org/name --json",
    "offmoe info model.gguf --check",
)
PACK_HELP = "Convert the safetensors MODEL to the GGUF file OUT, which llama.cpp can read too."
PACK = ("offmoe pack ./olmoe olmoe-q4_0.gguf --format q4_0",)


LAB = {"trace": "offmoe.lab.trace.cli", "bench": "offmoe.lab.bench_cli", "tune": "offmoe.lab.tune.cli"}


@click.group(cls=LazyGroup, modules=LAB, invoke_without_command=True, context_settings=CONTEXT, help=HELP)
@click.version_option(__version__, message="offmoe %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(cls=Command, examples=CHAT, help="Chat with MODEL (default: the demo); /help lists the chat's commands.")
@click.argument("model", required=False)
@chat_options
@file_option
@placement_options
@profile_option
@sampling_options
@system_option
@think_option
@reasoning_option
@plain_option
@stats_option("line")
def chat(**chosen: Any) -> None:
    from offmoe.app.start_chat import list_chats, start_chat

    if chosen.pop("list_chats"):
        list_chats()
    else:
        start_chat(load, **chosen)


@cli.command(cls=Command, examples=RUN, help=RUN_HELP)
@click.argument("model")
@click.argument("prompt", required=False)
@file_option
@placement_options
@profile_option
@sampling_options
@system_option
@think_option
@reasoning_option
@raw_option
@plain_option
@stats_option("off")
@json_option
def run(
    model: str,
    prompt: str | None,
    files: tuple[str, ...],
    system: str | None,
    think: str | None,
    reasoning: str,
    raw: bool,
    plain: bool,
    stats: str,
    as_json: bool,
    no_profile: bool,
    **chosen: Any,
) -> None:
    if raw and system:
        raise click.UsageError("--raw and --system exclude each other.")
    if raw and think:
        raise click.UsageError("--raw and --think exclude each other: --raw uses no template.")
    settings, sampling = parse_options(chosen)
    path, text = find_model(model), read_prompt(prompt, files)
    settings, profile_note = (settings, None) if no_profile else apply_profile(path, settings)
    with load(path, settings, think) as engine:
        for note in filter(None, [profile_note, *engine.notes]):
            click.echo(clean(note), err=True)
        asked = build_prompt(engine, text, system, raw)
        print_answer(engine, asked, sampling, None if as_json else reasoning, plain, stats)


@cli.command(cls=Command, examples=DOCTOR, help=DOCTOR_HELP)
@click.argument("model", default="demo")
@json_option
def doctor(model: str, as_json: bool) -> int:
    path = find_model(model)
    from offmoe.app.doctor import PROBLEM, run_checks, table

    checks = run_checks(path)
    if as_json:
        print_json([vars(check) for check in checks])
    else:
        console().print(table(checks))
    return int(any(check.status == PROBLEM for check in checks))


@cli.command(cls=Command, examples=INFO, help="Describe MODEL and the cost of one token, without loading it.")
@click.argument("model", default="demo")
@placement_options
@option("Output", "--check", "whole", is_flag=True, help="Read MODEL's files whole: is anything damaged or unread?")
@json_option
def info(model: str, whole: bool, as_json: bool, **chosen: Any) -> int:
    settings, path = Settings.of(**chosen), find_model(model)
    if whole:
        return check_files(path, as_json)
    from offmoe.app.info import inspect_model
    from offmoe.models.model import open_model

    opened = open_model(path)
    with opened.checkpoint:
        facts = inspect_model(opened, settings)
    if as_json:
        print_json(facts.as_dict())
    else:
        console().print(*section_tables(facts.sections()), sep="\n")
    return 0


def check_files(path: Path, as_json: bool) -> int:
    """Print what reading a model's files whole finds. Return the exit status: 1 if something is damaged."""
    with progress_bar("reading") as progress:
        from offmoe.app.check import check

        report = check(path, progress)
    if as_json:
        print_json(report.as_dict())
    else:
        click.echo("\n".join(map(one_line, report.lines())))
    return int(report.is_damaged)


@cli.command("pack", cls=Command, examples=PACK, help=PACK_HELP)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@option(
    "Output", "--format", "fmt", required=True, metavar="NAME", help="Format of the weights: q8_0, q4_0, mxfp4, q4_k, …"
)
@option("Output", "--force", is_flag=True, help="Overwrite OUT if it exists.")
def pack_command(model: str, out: Path, fmt: str, force: bool) -> None:
    path = find_model(model)
    with users_mistakes():
        check_output(out, force, ".gguf")
    from offmoe.checkpoint.open import open_checkpoint
    from offmoe.pack.convert import pack

    with open_checkpoint(path) as checkpoint, progress_bar(out.name) as progress:
        report = pack(checkpoint, out, fmt, partial(progress, out.name))
    for fallback in report.fallbacks:
        click.echo(str(fallback))


def load(path: Path, settings: Settings, think: str | None = None) -> Engine:
    """Load the engine behind a progress bar; `settings` and `think` as for Engine.load."""
    with gc_paused(), progress_bar("loading") as progress:
        from offmoe.engine import Engine

        engine = Engine.load(str(path), progress, think, settings)
        gc.freeze()  # everything allocated so far lives as long as the process
        return engine


def explain(error: BaseException) -> str | None:
    """Return the one-line message for an error, or None for a bug, whose traceback is printed."""
    match error:
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "offmoe"
            return f"{error.format_message()} Try '{command} --help'."
        case click.ClickException():
            return error.format_message()
        case OffmoeError():
            return str(error)
        case MemoryError():
            return "out of memory: lower --vram, --ram or --ctx"
        case OSError(strerror=str()):
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror}"
    from offmoe.cache.plugin import PluginError  # imports NumPy: only after an error

    if isinstance(error, PluginError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # torch's errors
        return "out of memory: lower --vram, --ram or --ctx"
    return None


def replace_closed_streams() -> None:
    """Open /dev/null for standard streams that are closed: Python sets them to None, and the next file opened would
    get their descriptor.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # open until the process ends


def discard_output() -> None:
    """Send what standard output still holds to /dev/null: its reader is gone, and the flush at exit would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    """Run the command line and print any error on one line. OFFMOE_DEBUG=1 prints its traceback instead."""
    replace_closed_streams()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a locale without "·" or "…"
    try:
        with terminable():
            status = cli.main(prog_name="offmoe", standalone_mode=False)
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.Abort:  # click turns Ctrl-C into this
        return 130
    except Terminated as ended:
        discard_output()
        return 128 + ended.signum
    except BrokenPipeError:
        discard_output()
        return 1
    except Exception as error:
        line = explain(error)
        if line is None or os.environ.get("OFFMOE_DEBUG"):
            raise
        click.echo(f"offmoe: {one_line(line)}", err=True)
        return 2 if isinstance(error, click.UsageError) else 1
