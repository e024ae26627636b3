"""The options that commands share, under headings in --help; checked into Settings and Sampling once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from offmoe.app.answer_printer import DIM, MODES
from offmoe.errors import OffmoeError
from offmoe.settings import Sampling, Settings

Decorator = Callable[[Any], Any]


class Option(click.Option):
    """An option with the heading that it stands under in --help."""

    def __init__(self, *names: Any, group: str, **arguments: Any) -> None:
        super().__init__(*names, **arguments)
        self.group = group


class Command(click.Command):
    """A command whose --help has headings over its options, and examples at the end."""

    def __init__(self, *arguments: Any, examples: tuple[str, ...], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, Option) and (record := param.get_help_record(ctx)):
                groups.setdefault(param.group, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {line}\n" for line in self.examples))


class LazyGroup(click.Group):
    """A group with commands of other modules, imported when they are named: `modules` maps a command to its module."""

    def __init__(self, *arguments: Any, modules: dict[str, str], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self.modules]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.modules:
            return super().get_command(ctx, name)
        command: click.Command = getattr(import_module(self.modules[name]), name)
        return command


def option(group: str, *names: str, **arguments: Any) -> Decorator:
    return click.option(*names, cls=Option, group=group, **arguments)


def together(*decorators: Decorator) -> Decorator:
    """One decorator that adds options in the order in which they are written."""

    def add(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


placing, answering = partial(option, "Placement"), partial(option, "Answer")
placement_options: Decorator = together(
    placing("--vram", metavar="SIZE|P%", help="For expert slots: 8GiB, or 50% of all routed records."),
    placing("--ram", metavar="SIZE", help="Pinned memory for records; what is beyond stays on disk."),
    placing("--policy", metavar="NAME[:KEY=VALUE]", help="What keeps its slot: lru, crf:h=64, ./mine.py:Mine."),
    placing(
        "--scope",
        type=click.Choice(["layer", "global"]),
        help="A quota a layer, or one pool.",
    ),
    placing("--device", metavar="NAME", help="cpu, cuda or cuda:N."),
    placing(
        "--dtype",
        type=click.Choice(["f32", "bf16", "f16"]),
        help="Of activations, trunk and KV; bf16 keeps KV in f16 on a GPU.",
    ),
    placing(
        "--ctx",
        type=int,
        metavar="N",
        help="Tokens of KV cache, beside --vram.",
    ),
    placing("--chunk", type=int, metavar="N", help="Tokens of a prompt that are run at once."),
    placing(
        "--kv",
        type=click.Choice(["same", "int8"]),
        help="Keys and values as --dtype, or in int8: half the memory, not lossless; on a GPU.",
    ),
    placing("--prefetch", metavar="NAME[:KEY=VALUE,…]", help="none, or gate:d=1,p=0.05,n=2; on a GPU."),
)
sampling_options: Decorator = together(
    answering("--max-tokens", type=int, metavar="N", help="End the answer after N tokens."),
    answering("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; may be repeated."),
    answering("--temperature", type=float, metavar="T", help="0 always takes the likeliest token."),
    answering("--top-k", type=int, metavar="K", help="Choose among the K likeliest; 0: all."),
    answering("--top-p", type=float, metavar="P", help="Choose among the likeliest that reach P together."),
    answering("--min-p", type=float, metavar="P", help="Drop what is below P times the likeliest."),
    answering("--repeat-penalty", type=float, metavar="R", help="Above 1: what was said is less likely."),
    answering("--seed", type=int, metavar="N", help="The same answer every time."),
    answering("--greedy", is_flag=True, help="The same as --temperature 0."),
)
system_option: Decorator = option("Conversation", "--system", metavar="TEXT", help="The system prompt.")
reasoning_option: Decorator = option(
    "Conversation",
    "--reasoning",
    type=click.Choice(MODES),
    default=DIM,
    help="What the model thinks before it answers: dim, folded into a line, or hidden.",
)
think_option: Decorator = option(
    "Conversation", "--think", metavar="on|off|WORD", help="Whether the model thinks, or how much: low, medium, high, …"
)
raw_option: Decorator = option("Conversation", "--raw", is_flag=True, help="PROMPT as it is, without a template.")
profile_option: Decorator = option(
    "Placement", "--no-profile", is_flag=True, help="Without what `offmoe tune` found for MODEL here."
)
json_option: Decorator = option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")


def spare_existing(out: Path, force: bool) -> None:
    """OffmoeError where there is a file already, unless it may be written over."""
    if out.exists() and not force:
        raise OffmoeError(f"{out} exists: choose another name, or --force to write over it")


def parse(chosen: dict[str, Any]) -> tuple[Settings, Sampling]:
    """What placement_options and sampling_options gave, checked."""
    if chosen.pop("greedy"):
        if chosen["temperature"]:
            raise click.UsageError("--greedy and --temperature exclude each other.")
        chosen["temperature"] = 0.0
    placement = {field.name: chosen.pop(field.name) for field in fields(Settings)}
    return Settings.of(**placement), Sampling.of(**chosen)
