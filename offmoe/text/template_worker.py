"""Renders one chat template for `chat_template.py`: a script of its own, which imports nothing of offmoe.

The environment is the one that Hugging Face's `apply_chat_template` makes; the limits are ours.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

sys.path.extend(sys.argv[1:])  # where the parent found them: -I hides user installs

import jinja2
import jinja2.debug  # imported by an error otherwise, perhaps without the memory for it
import jinja2.ext
from jinja2 import meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ALARM_S = 3.0  # one compilation or render, should the parent be gone; its own deadline is shorter
MEMORY = 1 << 29  # bytes of address space
TEXT = 1 << 22  # characters of one conversation


class Refusal(jinja2.TemplateError):
    """The template's own `raise_exception`."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it only opens a scope, as there."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


def raise_exception(message: str) -> None:
    raise Refusal(message)


def tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own: no HTML escapes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def compiled(source: str) -> tuple[jinja2.Template, list[str]]:
    """The template, and the names of the variables that it may be given."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    parsed = environment.parse(source)
    return environment.from_string(parsed), sorted(meta.find_undeclared_variables(parsed))


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """The text, given up as soon as it is longer than any context."""
    pieces, length = [], 0
    for piece in template.generate(tools=None, documents=None, **variables):
        pieces.append(piece)
        length += len(piece)
        if length > TEXT:
            raise ValueError(f"its text is longer than {TEXT} characters")
    return "".join(pieces)


def guarded(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of `work`, or the one line that says why there is none."""
    signal.setitimer(signal.ITIMER_REAL, ALARM_S)  # kills the process: no template can catch it
    try:
        return work(), None
    except Refusal as error:
        return None, f"the chat template refuses this conversation: {one_line(error)}"
    except Exception as error:
        return None, f"the model's chat template fails ({line(error)}): give plain text"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def line(error: Exception) -> str:
    place = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{type(error).__name__}{place}: {one_line(error)}".removesuffix(": ")


def one_line(error: Exception) -> str:
    return " ".join(str(error)[:1000].split())[:300]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    setup = json.loads(sys.stdin.buffer.readline())
    made, failure = guarded(lambda: compiled(setup["template"]))
    template: Any = made[0] if made else None
    reply({"variables": made[1] if made else []})
    for request in sys.stdin.buffer:
        variables = setup["variables"] | json.loads(request)
        text, error = (None, failure) if failure else guarded(lambda: render(template, variables))  # noqa: B023
        reply({"error": error} if error else {"text": text})


def reply(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
