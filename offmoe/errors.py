"""What offmoe raises for a user's mistake or a machine's limit; only the command line prints it."""


class OffmoeError(Exception):
    """One line: what was found, what was expected, what to do."""


class ContextFull(OffmoeError):
    """The prompt does not fit in the KV cache: `tokens` were needed, `ctx` are reserved."""

    def __init__(self, tokens: int, ctx: int) -> None:
        super().__init__(
            f"the conversation needs {tokens} tokens and the context holds {ctx}: "
            "drop old turns, or start again with a larger --ctx"
        )
        self.tokens = tokens
        self.ctx = ctx
