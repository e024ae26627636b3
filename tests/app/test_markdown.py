"""Streamed Markdown and wrapped words: the screen is that of the whole text rendered at once, and nothing is lost."""

from __future__ import annotations

import io
import random
import re

import pyte
import pytest
from rich.console import Console

from offmoe.app import markdown
from offmoe.app.markdown import AnswerMarkdown, MarkdownWriter, blocks, difference
from offmoe.app.wrap import WordWrapper

TEXT = """\
# Title

A paragraph with **bold**, *italic* and `code`, long enough that it has to be wrapped at the width of the screen.
Its second line.

```python
def add(first, second):
    return first + second  # a comment that is rather long, so that it has to wrap somewhere
```

| Name | Value |
|------|------:|
| one  | 1     |
| twenty-two | 22 |

1. first
2. second with [a link](http://example.com/page)
   - nested

> quoted

The end.
"""


def streamed(text: str, width: int, height: int, pieces: int) -> pyte.HistoryScreen:
    """Return the screen after `text` was written in random pieces."""
    screen = pyte.HistoryScreen(width, height, history=1000, ratio=0.5)
    screen.set_mode(pyte.modes.LNM)
    stream = pyte.Stream(screen)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system="standard")
    writer = MarkdownWriter(console)
    random.seed(pieces)
    cuts = sorted(random.sample(range(1, len(text)), min(pieces, len(text) - 1)))
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        writer.write(text[start:end])
    writer.end()
    stream.feed(file.getvalue())
    return screen


def lines(screen: pyte.HistoryScreen) -> list[str]:
    """Return the text of everything on the screen and above it, without trailing spaces and empty lines at the end."""
    rows = [*screen.history.top, *(screen.buffer[y] for y in range(screen.lines))]
    texts = ["".join(row[x].data for x in range(screen.columns)).rstrip() for row in rows]
    return "\n".join(texts).rstrip().split("\n")


@pytest.fixture(autouse=True)
def every_piece_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "REDRAW_S", 0)
    monkeypatch.setattr(markdown, "LOAD", 0)


@pytest.mark.parametrize("width", [20, 40, 80, 120])
@pytest.mark.parametrize("pieces", [1, 30, 300])
def test_the_screen_does_not_depend_on_the_pieces(width: int, pieces: int) -> None:
    """On a screen that is high enough for each block."""
    assert lines(streamed(TEXT, width, 40, pieces)) == lines(streamed(TEXT, width, 40, 0))


def test_markdown_is_rendered() -> None:
    text = "\n".join(lines(streamed(TEXT, 80, 60, 100)))
    assert "Title\n\nA paragraph with bold, italic and code, long" in text
    assert "def add(first, second):\n    return first + second" in text
    assert re.search(r"Name +Value\n ?─+\n one +1\n twenty-two +22", text)
    assert "1 first\n 2 second with a link (http://example.com/page)\n    • nested" in text
    assert "```" not in text


@pytest.mark.parametrize("height", [5, 10])
def test_a_block_higher_than_the_screen_is_whole(height: int) -> None:
    code = "\n".join(f"line_{number} = {number}" for number in range(50))
    assert lines(streamed(f"Look:\n\n```python\n{code}\n```\n\nDone.", 40, height, 60)) == [
        "Look:", "", *code.split("\n"), "", "Done.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "a <div> and <b>bold</b>",
        r"\(x_1 \cdot x_2\) and \[y\]",
        "Roses are red\nViolets are blue",
        "[1]: http://example.com",
        "![alt](http://example.com/a.png)",
        "<http://example.com>",
        "1 < 2 & 3 > 2",
        "中文字" * 30,
        "a\tb",
    ],
)
def test_no_word_is_lost(text: str) -> None:
    file = io.StringIO()
    console = Console(file=file, width=1000)
    console.print(AnswerMarkdown(text))
    words = re.findall(r"[\w.:/\\<>&]+", text)
    assert [word for word in words if word not in file.getvalue()] == []
    assert file.getvalue().count("\n") >= text.count("\n")


def test_blocks_end_at_line_feeds_alone() -> None:
    assert blocks("a\u2028b\n\nc\n\n> d\n") == ["a\u2028b\n\n", "c\n\n", "> d\n"]
    assert blocks("") == [""]


def test_a_difference_is_small() -> None:
    assert difference(["a"], ["ab"]) == "b"
    assert difference(["a"], ["a", "b"]) == "\nb"
    assert difference(["a", "b"], ["a", "c"]) == "\r\x1b[Jc"
    assert difference(["a", "b", "c"], ["a", "x", "c"]) == "\r\x1b[1A\x1b[Jx\nc"
    assert difference(["a", "b", "c"], ["a"]) == "\r\x1b[2A\x1b[Ja"


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("one two three", 8, "one two\nthree"),
        ("one two", 7, "one two"),
        ("one\n  two three", 7, "one\n  two\nthree"),
        ("a" * 12 + " b", 5, "a" * 12 + " b"),
        ("x " + "a" * 12 + " b", 5, "x\n" + "a" * 12 + " b"),
        ("中文中文中", 4, "中文\n中文\n中"),
        ("a\n\n\nb", 5, "a\n\n\nb"),
        ("  ", 5, "  "),
    ],
)
def test_words_are_wrapped(text: str, width: int, expected: str) -> None:
    for size in (1, 2, len(text)):
        wrapper = WordWrapper(lambda: width)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert "".join([*map(wrapper.push, pieces), wrapper.flush()]) == expected
