"""Chat templates. A template is untrusted code: a subprocess renders it, under a deadline and a memory limit."""

from __future__ import annotations

import json
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from offmoe.errors import OffmoeError

T = TypeVar("T")
WORKER = Path(__file__).with_name("template_worker.py")
START_S = 30.0  # deadline for importing jinja2 on a loaded machine; compilation has the worker's own alarm
RENDER_S = 2.0  # deadline for one render
MAX_OUTPUT = 1 << 27  # bytes per reply; the worker's own limit is far lower
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # message keys that templates read, by family
REASONING_ACCESS = re.compile(r"\.(reasoning_content|reasoning|thinking)\b|['\"](reasoning_content|reasoning)['\"]")


class ChatTemplate:
    """A chat template in its own worker process, which starts in the background and is restarted after a crash."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Start the worker. `variables` are what the template can read: bos_token, eos_token and so on."""
        self._setup: dict[str, Any] = {"template": source, "variables": dict(variables)}
        self.extra_variables: dict[str, Any] = {}  # more template variables, chosen by the user
        self._worker: TemplateWorker | None = TemplateWorker(self._setup)
        # Whether the template reads a message's reasoning separately from its content, even if only to drop it.
        self.reads_reasoning = REASONING_ACCESS.search(source) is not None

    @property
    def variables(self) -> list[str]:
        """Names of all undefined variables that the template reads; empty if it does not compile."""
        return self._request(lambda worker: worker.variables)

    def empty_variables(self) -> list[str]:
        """Return a note for each special token that the template reads and the model's files do not name.

        A template that does not compile in time gives none: it is refused when it is used, and raw text works.
        """
        source, known = self._setup["template"], self._setup["variables"]
        try:
            variables = self.variables
        except OffmoeError:
            return []
        return [
            f"the chat template reads {name}, which the model's files do not name: it is empty in prompts"
            for name in variables
            if name.endswith("_token") and name not in known and not re.search(rf"\b{name}\s+is\b", source)
        ]

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Return the text of a conversation. Raises OffmoeError with the template's own message if it rejects it."""
        request = {**self.extra_variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        reply = self._request(lambda worker: worker.ask(request))
        if "error" in reply:
            raise OffmoeError(reply["error"])
        return str(reply["text"])

    def _request(self, ask: Callable[[TemplateWorker], T]) -> T:
        """Return `ask(worker)`, on a running worker; an exception ends the worker."""
        self._worker = self._worker or TemplateWorker(self._setup)
        try:
            return ask(self._worker)
        except BaseException:  # Ctrl-C too: a reply left unread would be mistaken for the next one
            self.close()
            raise

    def close(self) -> None:
        """End the worker; the next render starts a new one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


class TemplateWorker:
    """Worker subprocess: one JSON line per request and per reply. It exits when its standard input closes."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        found = [find_spec(name) for name in ("jinja2", "markupsafe")]
        site_packages = [str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin]
        self._process = subprocess.Popen(  # -I: trust neither the current directory nor the environment
            [sys.executable, "-I", str(WORKER), *site_packages],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # do not receive the chat's Ctrl-C
        )
        self._variables: list[str] | None = None  # None until the template is compiled
        self._send(setup)

    @property
    def variables(self) -> list[str]:
        return self._wait_ready()

    def _wait_ready(self) -> list[str]:
        """Wait for the first reply, which follows the compilation, and return the template's variables."""
        if self._variables is None:
            self._variables = [str(name) for name in self._receive(START_S)["variables"]]
        return self._variables

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._wait_ready()
        self._send(request)
        return self._receive(RENDER_S)

    def kill(self) -> None:
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        line = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while line:
                line = line[self._process.stdin.write(line) :]
        except BrokenPipeError:
            pass  # reading the reply reports the reason

    def _receive(self, seconds: float) -> dict[str, Any]:
        """Read one reply. Raises OffmoeError if it does not arrive within `seconds` or the worker exits."""
        assert self._process.stdout is not None
        end, line = time.monotonic() + seconds, bytearray()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise OffmoeError(f"the model's chat template did not finish within {seconds:g} s: use plain text")
            chunk = self._process.stdout.read(1 << 16)
            if not chunk or len(line) > MAX_OUTPUT:
                raise OffmoeError(f"the model's chat template {self._exit_reason()}: use plain text")
            line += chunk
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _exit_reason(self) -> str:
        """End the process and return a phrase that says how it ended."""
        self.kill()
        code = self._process.returncode
        return "did not finish in time" if code == -signal.SIGALRM else f"ended its process (exit {code})"
