"""Chat templates are programs from strangers: a subprocess runs them, with a deadline and a memory limit."""

from __future__ import annotations

import json
import re
import secrets
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
START_S = 30.0  # to import jinja2 on a loaded machine; a compilation is ended by the worker's own alarm
RENDER_S = 2.0
MAX_OUTPUT = 1 << 27  # bytes of one reply; the worker cuts far below
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of a message, in one family or the other
READS_REASONING = re.compile(r"\.(reasoning_content|reasoning|thinking)\b|['\"](reasoning_content|reasoning)['\"]")


class ChatTemplate:
    """One template in one worker process, which starts in the background and again after a crash."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """`variables`: bos_token, eos_token and the like, as the template sees them."""
        self._setup = {"template": source, "variables": dict(variables)}
        self.chosen: dict[str, Any] = {}  # further variables, as a person wants them
        self._worker: Worker | None = Worker(self._setup)
        # Whether it looks for reasoning beside a message's content, if only to drop it.
        self.reads_reasoning = READS_REASONING.search(source) is not None

    @property
    def variables(self) -> list[str]:
        """The names of all that the template reads and does not set; of one that does not compile none."""
        return self._asked(lambda worker: worker.variables)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The text of a conversation; OffmoeError with the template's own message when it refuses."""
        visible = [{key: value for key, value in m.items() if key != "tokens"} for m in messages]
        request = {**self.chosen, "messages": visible, "add_generation_prompt": add_generation_prompt}
        reply = self._asked(lambda worker: worker.ask(request))
        if "error" in reply:
            raise OffmoeError(reply["error"])
        return str(reply["text"])

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> tuple[str, dict[str, Mapping[str, Any]]]:
        """The conversation's text with a mark for the content of each message that has `tokens`: text, marks.

        A content that the template drops or edits (reasoning in older turns) gets no mark.
        """
        text = self.render(messages, add_generation_prompt)
        marks = {f"offmoe{secrets.token_hex(8)}": m for m in messages if "tokens" in m}

        def attempt(used: dict[str, Mapping[str, Any]]) -> str | None:
            marked = [replaced(m, used) for m in messages]
            try:
                rendered = self.render(marked, add_generation_prompt)
            except OffmoeError:  # a template may check contents
                return None
            return rendered if same(rendered, used, text) else None

        rendered = attempt(marks) if marks else None
        if rendered is None and len(marks) > 1:
            marks = {mark: m for mark, m in marks.items() if attempt({mark: m}) is not None}
            rendered = attempt(marks) if marks else None
        return (text, {}) if rendered is None else (rendered, marks)

    def _asked(self, ask: Callable[[Worker], T]) -> T:
        self._worker = self._worker or Worker(self._setup)
        try:
            return ask(self._worker)
        except BaseException:  # Ctrl-C too: an answer that nobody read would be taken for the next one's
            self.close()
            raise

    def close(self) -> None:
        """End the worker; a later render starts a new one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


class Worker:
    """The subprocess: one JSON line a request, one a reply. It ends with its standard input."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        found = [find_spec(name) for name in ("jinja2", "markupsafe")]
        places = [str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin]
        self._process = subprocess.Popen(  # -I: neither the current directory nor the environment is trusted
            [sys.executable, "-I", str(WORKER), *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in the chat is not for it
        )
        self._variables: list[str] | None = None  # until it has compiled the template
        self._send(setup)

    @property
    def variables(self) -> list[str]:
        return self._wait_ready()

    def _wait_ready(self) -> list[str]:
        """The first reply, once the template is compiled: its variables."""
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
            pass  # the reply that does not come says why

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        end, line = time.monotonic() + seconds, bytearray()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise OffmoeError(f"the model's chat template did not finish within {seconds:g} s: give plain text")
            chunk = self._process.stdout.read(1 << 16)
            if not chunk or len(line) > MAX_OUTPUT:
                raise OffmoeError(f"the model's chat template {self._death()}: give plain text")
            line += chunk
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _death(self) -> str:
        self.kill()
        code = self._process.returncode
        return "did not finish in time" if code == -signal.SIGALRM else f"ended its process (exit {code})"


def replaced(message: Mapping[str, Any], marks: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """`message` with its mark for content, when it has one."""
    mark = next((mark for mark, marked in marks.items() if marked is message), None)
    return message if mark is None else {**message, "content": mark}


def same(rendered: str, marks: Mapping[str, Mapping[str, Any]], text: str) -> bool:
    """Whether `rendered` with contents for its marks is `text`. Templates may strip contents, all alike."""
    if any(rendered.count(mark) != 1 for mark in marks):
        return False
    for strip in (str, str.strip, str.lstrip, str.rstrip):
        filled = rendered
        for mark, message in marks.items():
            filled = filled.replace(mark, strip(message["content"]))
        if filled == text:
            return True
    return False
