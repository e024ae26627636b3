"""One answer, for scripts: its prompt from arguments, standard input and files, and how it is printed."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from typing import TYPE_CHECKING, Any

import click

from offmoe.app.answer_printer import AnswerPrinter
from offmoe.app.attachments import join, read_attachment
from offmoe.app.report import OFF, cut_note, stats_line
from offmoe.app.signals import Terminated, interruptible
from offmoe.app.terminal import choose_output, clean
from offmoe.errors import OffmoeError
from offmoe.text.read_text import decode_text

if TYPE_CHECKING:
    from offmoe.engine import Engine
    from offmoe.settings import Sampling

STDIN = "-"  # a PROMPT that stands for standard input
PATIENCE_S = 3.0  # silence of standard input after which the user is told that it is awaited


def read_prompt(prompt: str | None, files: tuple[str, ...]) -> str:
    """Return PROMPT, standard input and files, a blank line between them.

    Standard input is read if PROMPT is missing or `-`, and in addition to PROMPT if it is a file or a pipe. Raises
    OffmoeError if there is no text, or text that is not UTF-8.
    """
    typed = "" if prompt in (None, STDIN) else decode_text(os.fsencode(prompt), "PROMPT")
    attachments = [read_attachment(name) for name in files]
    wanted = prompt == STDIN or (prompt is None and not files)
    piped = decode_text(read_input(wanted), "standard input") if wanted or is_file_or_pipe() else ""
    text = join("\n\n".join(part for part in (typed, piped) if part.strip()), attachments)
    if not text.strip():
        raise OffmoeError("the prompt is empty: give PROMPT, or write it to standard input")
    return text


def is_file_or_pipe() -> bool:
    """Return whether standard input is a file, a pipe or a socket: not a terminal, /dev/null or another device."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # no descriptor: a program has replaced sys.stdin
        return True
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def read_input(wanted: bool) -> bytes:
    """Return standard input; if it is silent, say that it is awaited, and why unless it is `wanted`."""
    try:
        ready = select.select([sys.stdin], [], [], PATIENCE_S)[0]
    except (OSError, ValueError):
        ready = [sys.stdin]
    if not ready or (wanted and sys.stdin.isatty()):
        hint = "Ctrl-D ends it" if sys.stdin.isatty() else "</dev/null if there is none"
        click.echo(f"reading standard input; {hint}", err=True)
    return sys.stdin.buffer.read()


def build_prompt(engine: Engine, text: str, system: str | None, raw: bool) -> Any:
    """Return the argument of `Engine.generate`: token ids of raw text, messages, or one user message."""
    if raw:
        if engine.tokenizer is None:
            raise OffmoeError("--raw needs a tokenizer, and the model has none: use a model with a tokenizer")
        return engine.tokenizer.encode(text)
    if system:
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return text


def print_answer(
    engine: Engine, prompt: Any, sampling: Sampling, reasoning: str | None, plain: bool = False, stats_mode: str = OFF
) -> None:
    """Print the answer while it is generated; if `reasoning` is None, print one JSON object at its end."""
    printer = AnswerPrinter(choose_output(plain), reasoning) if reasoning else AnswerPrinter(None)
    try:
        with interruptible(engine.cancel):
            for piece in engine.generate(prompt, sampling):
                printer.add(piece)
    except Terminated:
        printer.finish()
        raise
    printer.finish()
    for note in engine.prompt_notes:
        click.echo(clean(note), err=True)
    stats = engine.stats()
    if not reasoning:
        texts = {"text": printer.text, "reasoning": printer.reasoning}
        print_json({**texts, **stats.as_dict(), "tokens": engine.answer_tokens})
    else:
        ctx = engine.plan.ctx
        full = f"the answer was cut because the context of {ctx} tokens is full: give a larger --ctx"
        notes = [
            stats_line(stats, ctx, mode=stats_mode),
            full if stats.finish_reason == "context" else None,
            cut_note(stats, printer.text, printer.reasoning),
        ]
        for note in filter(None, notes):
            click.echo(clean(note), err=True)
    if stats.finish_reason == "cancelled":
        raise KeyboardInterrupt


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))
