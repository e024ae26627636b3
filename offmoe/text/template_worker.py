"""Script that renders one chat template for `chat_template.py`; it imports nothing from offmoe.

The Jinja environment is the one of Hugging Face's `apply_chat_template`; the limits are offmoe's own.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

sys.path.extend(sys.argv[1:])  # the parent's paths of jinja2 and markupsafe: -I hides user installs

import jinja2
import jinja2.debug  # otherwise imported on the first error, when memory may have run out
import jinja2.ext
from jinja2 import meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ALARM_S = 3.0  # limit of one compilation or render if the parent is gone; the parent's deadline is shorter
MEMORY_LIMIT = 1 << 29  # bytes of address space
MAX_CHARACTERS = 1 << 22  # of one rendered conversation


class TemplateRejection(jinja2.TemplateError):
    """Raised by the template itself, through `raise_exception`."""


class GenerationTag(jinja2.ext.Extension):
    """Tag `{% generation %}`, which marks assistant text for training; as in transformers, it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        describe_error = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(describe_error)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def raise_exception(message: str) -> None:
    raise TemplateRejection(message)


def tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialise `x` to JSON, without the HTML escapes of jinja2's own filter."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def compile_template(source: str) -> tuple[jinja2.Template, list[str]]:
    """Return the compiled template and the names of its undefined variables."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    parsed = environment.parse(source)
    return environment.from_string(parsed), sorted(meta.find_undeclared_variables(parsed))


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Return the rendered text. Raises ValueError as soon as it is longer than MAX_CHARACTERS."""
    pieces, length = [], 0
    for piece in template.generate(tools=None, documents=None, **variables):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise ValueError(f"its text is longer than {MAX_CHARACTERS} characters")
    return "".join(pieces)


def run_guarded(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return (result of `work`, None), or (None, one-line error message)."""
    signal.setitimer(signal.ITIMER_REAL, ALARM_S)  # SIGALRM kills the process: a template cannot catch it
    try:
        return work(), None
    except TemplateRejection as error:
        return None, f"the chat template rejects this conversation: {one_line(error)}"
    except Exception as error:
        return None, f"the model's chat template fails ({describe_error(error)}): use plain text"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def describe_error(error: Exception) -> str:
    """Return the exception's type, line (of a syntax error) and message."""
    where = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{type(error).__name__}{where}: {one_line(error)}".removesuffix(": ")


def one_line(error: Exception) -> str:
    return " ".join(str(error)[:1000].split())[:300]


def main() -> None:
    """Read the template, then answer each request with a rendered text or an error, until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    setup = json.loads(sys.stdin.buffer.readline())
    result, failure = run_guarded(lambda: compile_template(setup["template"]))
    template: Any = result[0] if result else None
    reply({"variables": result[1] if result else []})
    for request in sys.stdin.buffer:
        variables = setup["variables"] | json.loads(request)
        text, error = (None, failure) if failure else run_guarded(lambda: render(template, variables))  # noqa: B023
        reply({"error": error} if error else {"text": text})


def reply(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
