"""Options shared by several commands, grouped under headings in --help, and parsed once into Settings and Sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import Any

import click

from offmoe.app.answer_printer import DIM, REASONING_MODES
from offmoe.app.report import LINE, STATS_MODES
from offmoe.settings import Sampling, Settings

Decorator = Callable[[Any], Any]


class Option(click.Option):
    """An option with the heading that it appears under in --help."""

    def __init__(self, *names: Any, group: str, bare: str | None = None, **arguments: Any) -> None:
        """`bare`: the value where the option stands without one; its type is a Choice."""
        super().__init__(*names, **arguments)
        self.group = group
        self.bare = bare


class Number(click.FloatRange):
    """A finite number, perhaps in a range: click's own types accept NaN, which lies inside every range."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number

    def _describe_range(self) -> str:
        return super()._describe_range() if self.min is not None or self.max is not None else ""


def bare_value(option: click.Parameter) -> str | None:
    """Return the value of an option that stands without one, or None if it needs one."""
    return option.bare if isinstance(option, Option) else None


def choices(option: click.Parameter) -> Sequence[str]:
    """Return the values that an option accepts, if there is a list of them."""
    return option.type.choices if isinstance(option.type, click.Choice) else ()


class Command(click.Command):
    """A command whose --help groups options under headings and ends with examples.

    An option whose value may be left out takes the next argument only if that is one of its choices.
    """

    def __init__(self, *arguments: Any, examples: tuple[str, ...], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._with_values(args)))

    def _with_values(self, args: list[str]) -> Iterator[str]:
        """Yield the arguments, with the value of each option that stands without one."""
        optional = {name: option for option in self.params if bare_value(option) for name in option.opts}
        for index, arg in enumerate(args):
            if arg == "--":
                yield from args[index:]
                return
            option = optional.get(arg)
            if option is None or args[index + 1 : index + 2] in [[value] for value in choices(option)]:
                yield arg
            else:
                yield f"{arg}={bare_value(option)}"

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
    """A group whose commands live in other modules, imported when used. `modules` maps a command to its module."""

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
    """Return click.option for an Option under the heading `group`."""
    return click.option(*names, cls=Option, group=group, **arguments)


def combine(*decorators: Decorator) -> Decorator:
    """Return one decorator that adds several options, in the order of the arguments."""

    def add(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


placement, sampling = partial(option, "Placement"), partial(option, "Answer")
placement_options: Decorator = combine(
    placement("--vram", metavar="SIZE|P%", help="Size of the VRAM budget for experts, e.g. 8GiB or 50%."),
    placement("--ram", metavar="SIZE", help="Size of the pinned host memory for experts; the rest is read from disk."),
    placement(
        "--policy", metavar="NAME[:KEY=VALUE]", help="Cache policy: lru, crf:h=64, or your own as ./mine.py:Mine."
    ),
    placement(
        "--scope",
        type=click.Choice(["layer", "global"]),
        help="Share the slots equally among layers, or use one pool for all.",
    ),
    placement("--device", metavar="NAME", help="Device to run on: cpu, cuda or cuda:N."),
    placement(
        "--dtype",
        type=click.Choice(["f32", "bf16", "f16"]),
        help="Data type of activations, non-expert weights and KV cache; with bf16 a GPU keeps the KV cache in f16.",
    ),
    placement(
        "--ctx",
        type=int,
        metavar="N",
        help="Size of the KV cache in tokens; its memory is not part of --vram.",
    ),
    placement("--chunk", type=int, metavar="N", help="Number of prompt tokens processed at once."),
    placement(
        "--kv",
        type=click.Choice(["same", "int8"]),
        help="Data type of the KV cache: as --dtype, or int8, which halves its memory and is lossy (GPU only).",
    ),
    placement(
        "--prefetch",
        metavar="NAME[:KEY=VALUE,…]",
        help="Prefetcher of experts: none, or gate:d=1,p=0.05,n=2 (GPU only).",
    ),
)
sampling_options: Decorator = combine(
    sampling("--max-tokens", type=int, metavar="N", help="Maximum number of tokens in the answer."),
    sampling("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT. May be repeated."),
    sampling(
        "--temperature", type=float, metavar="T", help="Sampling temperature; 0 always picks the most likely token."
    ),
    sampling("--top-k", type=int, metavar="K", help="Sample from the K most likely tokens; 0 means all."),
    sampling(
        "--top-p",
        type=float,
        metavar="P",
        help="Sample from the most likely tokens whose probabilities add up to P.",
    ),
    sampling("--min-p", type=float, metavar="P", help="Drop tokens less likely than P times the most likely one."),
    sampling(
        "--repeat-penalty",
        type=float,
        metavar="R",
        help="Values above 1 make tokens that already occurred less likely.",
    ),
    sampling("--seed", type=int, metavar="N", help="Seed of the sampler; the same seed gives the same answer."),
    sampling("--greedy", is_flag=True, help="Same as --temperature 0."),
)
system_option: Decorator = option("Conversation", "--system", metavar="TEXT", help="System prompt.")
reasoning_option: Decorator = option(
    "Conversation",
    "--reasoning",
    type=click.Choice(REASONING_MODES),
    default=DIM,
    help="How to display the model's reasoning: dim, folded into one line, or hidden.",
)
think_option: Decorator = option(
    "Conversation",
    "--think",
    metavar="on|off|WORD",
    help="Turn the model's thinking on or off, or set its effort: low, medium, high, …",
)
chat_options: Decorator = combine(
    option("Conversation", "-c", "--continue", "again", is_flag=True, help="Continue the last chat, with its model."),
    option("Conversation", "--list", "list_chats", is_flag=True, help="List the kept chats; /load NAME continues one."),
    option("Conversation", "--no-keep", is_flag=True, help="Keep neither this chat nor the input history."),
    option("Conversation", "--commands", is_flag=True, help="Run /commands from a pipe too; without it, all is text."),
)
file_option: Decorator = option(
    "Conversation",
    "-f",
    "--file",
    "files",
    multiple=True,
    metavar="FILE",
    help="Add a text file to the (first) message. May be repeated.",
)
plain_option: Decorator = option(
    "Output", "--plain", is_flag=True, help="Print answers as generated: no Markdown, no line breaks between words."
)


def stats_option(default: str) -> Decorator:
    """Return the option --stats."""
    return option(
        "Output",
        "--stats",
        type=click.Choice(STATS_MODES),
        default=default,
        bare=LINE,
        show_default=True,
        help="Statistics after an answer: a line, a short one, or none.",
    )


raw_option: Decorator = option(
    "Conversation", "--raw", is_flag=True, help="Use PROMPT as it is, without the chat template."
)
profile_option: Decorator = option(
    "Placement",
    "--no-profile",
    is_flag=True,
    help="Ignore the profile that `offmoe tune` wrote for MODEL on this machine.",
)
json_option: Decorator = option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")


def parse_options(chosen: dict[str, Any]) -> tuple[Settings, Sampling]:
    """Return the checked values of placement_options and sampling_options."""
    if chosen.pop("greedy"):
        if chosen["temperature"]:
            raise click.UsageError("--greedy and --temperature exclude each other.")
        chosen["temperature"] = 0.0
    settings = {field.name: chosen.pop(field.name) for field in fields(Settings)}
    return Settings.of(**settings), Sampling.of(**chosen)
