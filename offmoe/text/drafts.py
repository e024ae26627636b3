"""Messages on their way into a chat template: which texts they bring, and where these are in the rendered prompt."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offmoe.errors import OffmoeError
from offmoe.text.chat_template import REASONING_KEYS

Located = list[tuple[str, str]]  # (text, placeholder of the field that it comes from, or "")


def new_name() -> str:
    """Return digits that no message contains: templates leave them as they are, in capitals and titles too."""
    return f"{secrets.randbelow(10**20):020}"


@dataclass(frozen=True)
class Field:
    """A text that a message brings: its content or reasoning, or a part of them."""

    text: str
    hidden: str  # the text with a stand-in for whatever spells a control token
    tokens: Sequence[int] | None = None  # ids that a model generated for the text
    name: str = field(default_factory=new_name)  # its placeholder

    @property
    def is_blank(self) -> bool:
        return not self.text.strip()

    @property
    def placeholder(self) -> str:
        """The name, or the text itself if it is blank: templates ask whether there is any."""
        return self.text if self.is_blank else self.name


@dataclass(frozen=True)
class Draft:
    """A message as fields, with marks around reasoning in its content where the template reads them there."""

    role: str
    content: tuple[Field | str, ...]
    reasoning: Field | None = None  # for templates that read it under a key of its own

    @property
    def fields(self) -> list[Field]:
        return [part for part in (self.reasoning, *self.content) if isinstance(part, Field)]

    def message(self, show: Callable[[Field], str], typed: bool) -> dict[str, Any]:
        """Return the message for the template; `typed` gives its content as a list of parts."""
        content = "".join([show(part) if isinstance(part, Field) else part for part in self.content])
        reasoning = dict.fromkeys(REASONING_KEYS, show(self.reasoning)) if self.reasoning else {}
        return {
            "role": self.role,
            "content": [{"type": "text", "text": content}] if typed else content,
            **reasoning,
        }

    def is_lost(self, text: str, marked: str) -> bool:
        """Return whether nothing of the content is in the prompt's `text`, or in `marked`, which has placeholders."""
        contents = [part for part in self.content if isinstance(part, Field) and not part.is_blank]
        return bool(contents) and not any(part.name in marked or part.hidden.strip() in text for part in contents)


def align(marked: str, text: str, fields: Mapping[str, Field]) -> Located | None:
    """Return `text`, cut at the fields whose names are in `marked`; None if it differs in anything but the fields.

    Templates may strip whitespace from a field.
    """
    pieces = re.split(f"({'|'.join(fields)})", marked) if fields else [marked]
    if not text.startswith(pieces[0]):
        return None
    located, at = [(pieces[0], "")], len(pieces[0])
    for name, literal in zip(pieces[1::2], pieces[2::2], strict=True):
        for variant in stripped(fields[name].hidden):
            end = at + len(variant)
            if text.startswith(variant, at) and text.startswith(literal, end):
                break
        else:
            return None
        located += [(variant, name), (literal, "")]
        at = end + len(literal)
    return located if at == len(text) else None


def stripped(text: str) -> list[str]:
    """Return `text` and what remains of it after each way in which templates strip it."""
    ways = (str.rstrip, str.lstrip, str.strip)
    return list(dict.fromkeys([text, *(way(text) for way in ways), *(way(text, "\n") for way in ways)]))


def cut_after(located: Located, last: Draft) -> Located:
    """Return the prompt up to the end of its last message's text, so that the answer continues it.

    Raises OffmoeError if the template does not print that text.
    """
    final = [field for field in last.fields if not field.is_blank][-1]
    names = [name for _, name in located]
    if final.name in names:
        return located[: len(names) - names[::-1].index(final.name)]
    (text, _), core = located[-1], final.hidden.strip()
    if core not in text:
        raise OffmoeError("the chat template leaves out the start of the answer, so that it cannot be continued")
    begin = text.rindex(core)
    rest = final.hidden[final.hidden.index(core) :]
    return [*located[:-1], (text[: begin + len(rest if text.startswith(rest, begin) else core)], "")]
