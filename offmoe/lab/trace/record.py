"""`offmoe trace record`: answer prompts until enough tokens are decoded, and record their routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from offmoe.cache.trace import Trace
from offmoe.engine import Engine
from offmoe.errors import ContextFull, OffmoeError
from offmoe.lab.trace.prompts import Prompt
from offmoe.lab.trace.recorder import Recorder
from offmoe.settings import Sampling

MIN_ANSWER = 24  # tokens allowed per answer, however many prompts share the total


class Recording:
    """A run over `prompts` with a Recorder, which gets the keyword arguments. `stop` ends it after any token."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, **keep: bool) -> None:
        self.engine, self.prompts = engine, prompts
        self.sampling = sampling.merged(Sampling(seed=0))
        self.recorder = Recorder(engine, **keep)
        self.stopped = False

    def stop(self) -> None:
        """End the run; the trace so far is kept."""
        self.stopped = True
        self.engine.cancel()

    def run(self, tokens: int, progress: Callable[[int], None]) -> None:
        """Decode at least `tokens`, shared evenly among prompts; if answers end early, in more rounds with other
        seeds.

        Greedy answers would repeat, so they run once. Raises OffmoeError if a prompt cannot be run.
        """
        once = self.sampling.merged(self.engine.sampling).temperature == 0
        with self.recorder:
            for round_index in range(1 if once else tokens):
                before = self.recorder.tokens
                self._turn(round_index, tokens, progress)
                if self.stopped or self.recorder.tokens >= tokens or self.recorder.tokens == before:
                    return

    def trace(self) -> Trace:
        """Return the trace so far. Raises OffmoeError if nothing was decoded."""
        chosen = self.sampling.merged(self.engine.sampling)
        temperature = "greedy" if chosen.temperature == 0 else f"temperature {chosen.temperature:g}"
        return self.recorder.trace(phase="decode", sampling=f"{temperature}, seed {chosen.seed}")

    def _turn(self, round_index: int, tokens: int, progress: Callable[[int], None]) -> None:
        for index, prompt in enumerate(self.prompts):
            missing = tokens - self.recorder.tokens
            if self.stopped or missing <= 0:
                return
            share = max(-(-missing // (len(self.prompts) - index)), min(MIN_ANSWER, missing))
            self._answer(prompt, round_index, share, progress)

    def _answer(self, prompt: Prompt, round_index: int, tokens: int, progress: Callable[[int], None]) -> None:
        engine, before = self.engine, self.recorder.tokens
        self.recorder.label = prompt.kind
        engine.reset()
        # The first token comes from the prompt's logits, and the last one is not run.
        seeded = Sampling(seed=(self.sampling.seed or 0) + round_index, max_tokens=tokens + 1).merged(self.sampling)
        try:
            for count, _ in enumerate(engine.generate(generate_argument(engine, prompt), seeded)):
                progress(before + count)
                if self.stopped:  # `stop` was called before this answer began
                    engine.cancel()
        except ContextFull as error:
            raise OffmoeError(f"prompt {str(prompt.given)[:40]!r}: {error}") from None


def generate_argument(engine: Engine, prompt: Prompt) -> Any:
    """Return the argument of Engine.generate."""
    if not prompt.raw:
        return prompt.given
    if engine.tokenizer is None:
        raise OffmoeError("raw text needs a tokenizer, and the model has none: use a model with a tokenizer")
    return engine.tokenizer.encode(prompt.given)
