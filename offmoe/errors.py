"""Errors caused by a user's input or a machine's limits; only the command line prints them."""

from collections.abc import Iterator
from contextlib import contextmanager


class OffmoeError(Exception):
    """An error of one line: what was found, what was expected, what to do."""


@contextmanager
def users_mistakes() -> Iterator[None]:
    """Turn a ValueError inside, as `offmoe.cache` raises for a user's mistake, into an OffmoeError."""
    try:
        yield
    except ValueError as error:
        raise OffmoeError(str(error)) from error


class ContextFull(OffmoeError):
    """The prompt does not fit in the KV cache: it needs `tokens` positions, and `ctx` are reserved.

    `turns`: messages of the user in the prompt; of several, the oldest can be dropped.
    """

    def __init__(self, tokens: int, ctx: int, turns: int = 1) -> None:
        what, remedy = ("conversation", "drop old turns") if turns > 1 else ("prompt", "shorten it")
        needs = f"the {what} needs {tokens} tokens and the context holds {ctx}"
        super().__init__(f"{needs}: {remedy}, or start again with a larger --ctx")
        self.tokens = tokens
        self.ctx = ctx
