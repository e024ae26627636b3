"""Record a chat with the demo model as an SVG: `python docs/record_session.py docs/images/chat.svg`.

The real `offmoe chat` runs in a pseudo-terminal, whose screen is emulated and drawn. Needs `offmoe[test]`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import pexpect
import pyte

from offmoe.app.prompt import HINT

COLUMNS, ROWS = 120, 40
COMMAND = ("offmoe", "chat", "demo", "--vram", "50%", "--device", "cpu", "--greedy", "--no-profile", "--no-keep")
QUESTIONS = ("What is the capital of France?", "What is photosynthesis?", "What is bread made of?")
DONE = re.compile(r"\d+ tokens? ·.* roof ")  # the line after an answer
CELL, HEIGHT, PAD, BAR = 8.43, 19, 16, 34  # width and height of a character, margins, title bar
COLOURS = {
    "default": "#d5d8dd",
    "black": "#8b93a1",
    "brightblack": "#8b93a1",
    "red": "#f87171",
    "green": "#86efac",
    "brown": "#fcd34d",
    "blue": "#93c5fd",
    "magenta": "#d8b4fe",
    "cyan": "#67e8f9",
    "white": "#f3f4f6",
}


def record() -> pyte.Screen:
    """Run the session; return the terminal's screen after the last answer."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    stream.feed(f"$ {' '.join(COMMAND)}\r\n")
    child = pexpect.spawn(
        sys.executable,
        ["-m", *COMMAND],
        dimensions=(ROWS, COLUMNS),
        encoding="utf-8",
        env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"},
    )
    run_until(child, stream, screen, lambda text: "›" in text)
    for number, question in enumerate(QUESTIONS, 1):
        child.send(question + "\r")
        run_until(child, stream, screen, lambda text, number=number: len(DONE.findall(text)) == number)  # type: ignore[misc]
        run_until(child, stream, screen, lambda text: text.rstrip().endswith(HINT))
    child.close(force=True)
    return screen


def run_until(child: Any, stream: pyte.Stream, screen: pyte.Screen, done: Callable[[str], bool]) -> None:
    """Feed the screen until `done` holds for its text and the program is silent; answer requests for the cursor."""
    while True:
        try:
            text = child.read_nonblocking(4096, timeout=1 if done("\n".join(screen.display)) else 300)
        except pexpect.TIMEOUT:
            return
        stream.feed(re.sub(r"\x1b\[(?:0;)?2m", "\x1b[90m", text))  # pyte ignores dim text: bright black is as readable
        for _ in re.findall(r"\x1b\[6n", text):
            child.send(f"\x1b[{screen.cursor.y + 1};{screen.cursor.x + 1}R")


def svg(screen: pyte.Screen) -> str:
    """Draw the screen, without its empty last rows, as a dark window that is readable on light and dark pages."""
    rows = [[screen.buffer[y][x] for x in range(COLUMNS)] for y in range(ROWS)]
    while not "".join(cell.data for cell in rows[-1]).strip(" ›").removeprefix(HINT):
        rows.pop()
    width, height = COLUMNS * CELL + 2 * PAD, BAR + len(rows) * HEIGHT + PAD
    texts = "\n".join(text for y, row in enumerate(rows) for text in draw(row, BAR + y * HEIGHT + 14))
    dots = "".join(f'<circle cx="{20 + 18 * i}" cy="17" r="5.5" fill="#4b5563"/>' for i in range(3))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,monospace" font-size="14">\n'
        f"<title>A chat with the demo model, half of its experts in slots</title>\n"
        f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="8" fill="#1b1f27" '
        f'stroke="#4b5563"/>\n'
        f"{dots}\n{texts}\n</svg>\n"
    )


def draw(row: list[Any], y: int) -> list[str]:
    """Return the elements of one row of the screen: a run of equal style each."""
    elements, at = [], 0
    for (colour, bold), run in groupby(row, key=lambda cell: (cell.fg, cell.bold)):
        text = "".join(cell.data for cell in run)
        shown = text.rstrip()
        if shown:
            fill = COLOURS.get(colour, f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else COLOURS["default"])
            weight = ' font-weight="bold"' if bold else ""
            elements.append(
                f'<text x="{PAD + at * CELL:.1f}" y="{y}" fill="{fill}"{weight} textLength="{len(shown) * CELL:.1f}" '
                f'xml:space="preserve">{escape(shown)}</text>'
            )
        at += len(text)
    return elements


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(record()), "utf-8")
