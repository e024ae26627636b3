"""Record a chat with the demo model as an SVG: `python docs/record_session.py docs/images/chat.svg`.

The real `offmoe chat` runs in a pseudo-terminal, whose screen is emulated and drawn. Needs `offmoe[test]`.
"""

from __future__ import annotations

import re
import sys
from html import escape
from itertools import groupby
from pathlib import Path

import pexpect
import pyte

COLUMNS, ROWS = 104, 30
QUESTIONS = ("What is the capital of France?", "Write a short poem about rain.", "/set max_tokens 60")
WIDTH, HEIGHT, PAD = 8.43, 18, 14  # of a character cell, and around the screen
COLOURS = {"default": "#d5d8dd", "black": "#6b7280", "red": "#f87171", "green": "#86efac", "brown": "#fcd34d",
           "blue": "#93c5fd", "magenta": "#d8b4fe", "cyan": "#67e8f9", "white": "#f3f4f6"}  # fmt: skip


def record() -> pyte.Screen:
    """Run the session; return the terminal's screen after the last answer."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    command = [sys.executable, "-m", "offmoe", "chat", "demo", "--vram", "50%", "--greedy", "--no-profile"]
    child = pexpect.spawn(command[0], command[1:], dimensions=(ROWS, COLUMNS), encoding="utf-8", timeout=120)
    answer_cursor(child, stream, screen)
    for question in QUESTIONS:
        child.send(question + "\r")
        answer_cursor(child, stream, screen)
    child.close(force=True)
    return screen


def answer_cursor(child: pexpect.spawn, stream: pyte.Stream, screen: pyte.Screen) -> None:
    """Feed the screen until the program is silent for 6 s; answer its requests for the cursor's position."""
    while True:
        try:
            text = child.read_nonblocking(4096, timeout=6)
        except pexpect.TIMEOUT:
            return
        stream.feed(text)
        for _ in re.findall(r"\x1b\[6n", text):
            child.send(f"\x1b[{screen.cursor.y + 1};{screen.cursor.x + 1}R")


def svg(screen: pyte.Screen) -> str:
    """Draw the screen, without its empty last rows, on a dark window that is readable on any page."""
    rows = [screen.buffer[y] for y in range(screen.lines)]
    while rows and not "".join(rows[-1][x].data for x in range(screen.columns)).strip():
        rows.pop()
    width, height = COLUMNS * WIDTH + 2 * PAD, len(rows) * HEIGHT + 2 * PAD
    lines = []
    for y, row in enumerate(rows):
        cells = [row[x] for x in range(screen.columns)]
        at = 0
        for (colour, bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            text = "".join(cell.data for cell in run)
            if text.strip():
                weight = ' font-weight="bold"' if bold else ""
                fill = COLOURS.get(colour, f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else COLOURS["default"])
                lines.append(
                    f'<text x="{PAD + at * WIDTH:.1f}" y="{PAD + y * HEIGHT + 13}" fill="{fill}"{weight} '
                    f'textLength="{len(text) * WIDTH:.1f}" xml:space="preserve">{escape(text)}</text>'
                )
            at += len(text)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,monospace" font-size="14">'
        f"<title>A chat with the demo model, half of its experts in slots</title>"
        f'<rect width="100%" height="100%" rx="8" fill="#1b1f27"/>{"".join(lines)}</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(record()), "utf-8")
