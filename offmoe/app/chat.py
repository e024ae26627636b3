"""Chat loop: a line of input is a message, or at a terminal a command."""

from __future__ import annotations

import re
from difflib import get_close_matches

from offmoe.app.commands import BY_NAME, ExitChat
from offmoe.app.session import Session
from offmoe.app.terminal import one_line
from offmoe.errors import OffmoeError

WORD = re.compile(r"/ *([^\s/]+)(?:[ \t]+(.*))?", re.DOTALL)
BLOCK = re.compile(r'"""\n?(.*?)\n?(?:""")?', re.DOTALL)
CLOSE = 0.7  # similarity from which a word is taken for a mistyped command


class Chat(Session):
    """A session driven by its user's input."""

    def loop(self) -> None:
        """Run until the end of the input or /exit. Without a terminal, the first error ends the loop."""
        while (text := self.ui.ask()) is not None:
            try:
                self.handle(text)
            except ExitChat:
                return
            except OffmoeError as error:
                if not self.ui.interactive:
                    raise
                self.ui.note(f"offmoe: {one_line(str(error))}")

    def handle(self, text: str) -> None:
        """Run a command, or send a message."""
        command = find_command(text) if self.ui.commands else None
        if command:
            name, argument = command
            if argument and not BY_NAME[name].usage:
                raise OffmoeError(f"/{name} takes no argument: begin a message with // if it is to begin with /")
            BY_NAME[name].run(self, argument)
        elif text.strip():
            self.send(plain_message(text) if self.ui.commands else text)


def find_command(text: str) -> tuple[str, str] | None:
    """Return the command and the argument that a line is, or None for a message. Raises OffmoeError for a line that is
    nearly a command.

    A command is a slash and one word of letters. A path (/etc/passwd), a slash before a space (/ is root) and whatever
    begins with // are text, as are several lines, unless they are an argument in triple quotes.
    """
    match = WORD.fullmatch(text.strip())
    if match is None:
        return None
    word, argument = match[1].lower(), (match[2] or "").strip()
    block = BLOCK.fullmatch(argument) if argument.startswith('"""') else None
    if "\n" in text.strip() and not block:
        return None
    near = get_close_matches(word.strip(".,:;!?=") or word, BY_NAME, 1, CLOSE)
    spaced = text.strip().startswith("/ ")
    if word in BY_NAME and not spaced:
        return word, block[1] if block else argument
    if spaced and (argument or word not in BY_NAME):
        return None
    if not near and not re.fullmatch("[a-z]+", word):
        return None
    hint = f"did you mean /{near[0]}?" if near else "/help lists them all;"
    raise OffmoeError(f"/{word} is not a command: {hint} A message that begins with / is written with //")


def plain_message(text: str) -> str:
    """Return a message without the quotes of a block or the slash that escapes a slash."""
    stripped = text.strip()
    if stripped.startswith('"""') and (block := BLOCK.fullmatch(stripped)):
        return block[1]
    return text.replace("//", "/", 1) if stripped.startswith("//") else text
