"""Markdown of an answer, rendered by rich while it is streamed."""

from __future__ import annotations

import re
import time
from itertools import pairwise
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.syntax import Syntax

ESCAPE = re.compile(r"\x1b\[[\d;]*m")  # all that rich writes for styles
REDRAW_S = 0.04  # least time between two redraws; slower renderings are repeated less often
LOAD = 10  # at most one tenth of the time goes into rendering


class LeftHeading(Heading):
    """A heading at the left edge."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class PlainCodeBlock(CodeBlock):
    """Highlighted code without margins and background, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True)


class AnswerMarkdown(Markdown):
    """Markdown in which nothing that a model wrote gets lost: HTML and backslashes (as in LaTeX) are text, a line break
    is a line break, and a link displays its address.
    """

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": LeftHeading,
        "fence": PlainCodeBlock,
        "code_block": PlainCodeBlock,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = parse(text)
        for token in self.parsed:
            for child in token.children or []:
                child.type = "hardbreak" if child.type == "softbreak" else child.type


def parse(text: str) -> list[Token]:
    """Return the tokens of Markdown text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    return parser.disable(["escape", "reference", "image", "autolink"]).parse(text)


def blocks(text: str) -> list[str]:
    """Return the blocks of Markdown text: paragraphs, lists, tables, … All but the last are final."""
    starts = [token.map[0] for token in parse(text) if token.level == 0 and token.nesting >= 0 and token.map]
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)  # not splitlines, which ends lines at U+2028 too
    return ["".join(lines[start:end]) for start, end in pairwise([0, *starts[1:], len(lines)])]


class MarkdownWriter:
    """Writes an answer's Markdown: finished blocks once, the block under way again whenever its look changes.

    Of a block that is higher than the screen, the lines that scrolled off stay as they were drawn.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines: list[str] = []  # of the block under way, on the screen
        self._reset()

    def write(self, text: str) -> None:
        """Add text, and draw it unless something was drawn a moment ago."""
        self._text += text
        if time.monotonic() >= self._next_draw:
            self._draw()

    def end(self) -> None:
        """Draw what is left, and end the line."""
        self._draw()
        if self._begun:
            self._console.file.write("\n")
            self._console.file.flush()
        self._reset()

    def forget(self) -> None:
        """Leave the lines that are on the screen, which something else moved; the block is drawn again below them."""
        self._lines = []
        self._scrolled = 0

    def _reset(self) -> None:
        self._text = ""  # from the start of the block under way
        self._lines = []
        self._scrolled = 0  # lines of it that scrolled off
        self._begun = False
        self._size = self._console.size
        self._next_draw = 0.0

    def _draw(self) -> None:
        began = time.monotonic()
        if self._size != self._console.size:
            self._size = self._console.size
            self.forget()
        *final, self._text = blocks(self._text)
        for block in final:
            self._draw_block(block)
            self._lines, self._scrolled = [], 0
        self._draw_block(self._text)
        self._console.file.flush()
        now = time.monotonic()
        self._next_draw = now + max(REDRAW_S, LOAD * (now - began))

    def _draw_block(self, text: str) -> None:
        """Bring the screen from `_lines` to the rendered text, rewriting as little as possible."""
        lines = self._render(text)[self._scrolled :]
        if not lines:
            return
        if not self._lines:
            self._console.file.write("\n\n" if self._begun and not self._scrolled else "")
            self._console.file.write("\n".join(lines))
        else:
            self._console.file.write(difference(self._lines, lines))
        self._begun = True
        hidden = max(0, len(lines) - self._size.height + 1)
        self._lines = lines[hidden:]
        self._scrolled += hidden

    def _render(self, text: str) -> list[str]:
        """Return the lines of rendered Markdown, without empty ones around them."""
        with self._console.capture() as captured:
            self._console.print(AnswerMarkdown(text), width=max(1, self._size.width - 1))
        lines = [line.rstrip() for line in captured.get().split("\n")]
        filled = [index for index, line in enumerate(lines) if ESCAPE.sub("", line).strip()]
        return lines[filled[0] : filled[-1] + 1] if filled else []


def difference(old: list[str], new: list[str]) -> str:
    """Return the characters that turn the lines `old`, with the cursor at the end of the last, into `new`."""
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    if same == len(old):
        return "".join(f"\n{line}" for line in new[same:])
    if same == len(old) - 1 < len(new) and new[same].startswith(old[same]):
        return "\n".join([new[same][len(old[same]) :], *new[same + 1 :]])
    same = min(same, len(new) - 1)
    up = len(old) - 1 - same
    return "\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J" + "\n".join(new[same:])
