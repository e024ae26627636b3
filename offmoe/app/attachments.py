"""Files that become part of a message: `-f FILE`, `/read FILE`, and `@FILE` in a message typed at a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from offmoe.errors import OffmoeError
from offmoe.text.read_text import read_text

MENTION = re.compile(r'(?<!\S)@(?:"([^"\n]+)"|(\S+))')
PUNCTUATION = ".,;:!?)]}'\""  # may follow a file's name in a sentence


@dataclass(frozen=True)
class Attachment:
    """A file's name and text."""

    name: str
    text: str

    @property
    def summary(self) -> str:
        """Name and length, for a note."""
        return f"{self.name} ({len(self.text):,} characters)"

    def __str__(self) -> str:
        """Return the file as a part of a message: its name, and its text between fences that do not occur in it."""
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", self.text)), default=0))
        return f"{self.name}:\n{fence}\n{self.text.rstrip()}\n{fence}"


def read_attachment(name: str) -> Attachment:
    """Read a file. Raises OffmoeError if it is no readable, non-empty text."""
    path = Path(os.path.expanduser(name))
    if path.exists() and not path.is_file():
        raise OffmoeError(f"{name} is not a regular file: give a text file")
    text = read_text(path)
    if not text.strip():
        raise OffmoeError(f"{name} is empty: give a file that has text")
    if "\0" in text:
        raise OffmoeError(f"{name} is not text: it has a zero byte")
    return Attachment(name, text)


def mentioned_files(message: str) -> Iterator[str]:
    """Yield the names of the files that a message mentions as `@FILE` or `@"FILE"`. Anything else after @ is text."""
    seen = set()
    for quoted, bare in MENTION.findall(message):
        for name in (quoted,) if quoted else (bare, bare.rstrip(PUNCTUATION)):
            if name and os.path.isfile(os.path.expanduser(name)):
                if name not in seen:
                    seen.add(name)
                    yield name
                break


def join(text: str, attachments: Iterable[Attachment]) -> str:
    """Return a message followed by files, a blank line between all of them."""
    return "\n\n".join([*([text] if text.strip() else []), *map(str, attachments)])
