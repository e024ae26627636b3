"""What offmoe raises for a user's mistake or a machine's limit; only the command line prints it."""

from collections.abc import Iterator
from contextlib import contextmanager


class OffmoeError(Exception):
    """One line: what was found, what was expected, what to do."""


@contextmanager
def users_mistakes() -> Iterator[None]:
    """What cache/ says of a user's mistake, a ValueError, is for the user."""
    try:
        yield
    except ValueError as error:
        raise OffmoeError(str(error)) from error


class ContextFull(OffmoeError):
    """The prompt does not fit in the KV cache: `tokens` were needed, `ctx` are reserved."""

    def __init__(self, tokens: int, ctx: int) -> None:
        super().__init__(
            f"the conversation needs {tokens} tokens and the context holds {ctx}: "
            "drop old turns, or start again with a larger --ctx"
        )
        self.tokens = tokens
        self.ctx = ctx
