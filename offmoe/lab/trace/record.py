"""`offmoe trace record`: answer prompts until so many tokens are decoded, and keep their routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from offmoe.cache.trace import Trace
from offmoe.engine import Engine
from offmoe.errors import ContextFull, OffmoeError
from offmoe.lab.trace.prompts import Prompt
from offmoe.lab.trace.recorder import Recorder
from offmoe.settings import Sampling

LEAST = 24  # tokens that an answer may have, however many prompts share what is wanted


class Recording:
    """A run over `prompts`: `run` may be ended by `stop` at any token; `trace` is what is there. keep: of Recorder."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, **keep: bool) -> None:
        self.engine, self.prompts = engine, prompts
        self.sampling = sampling.merged(Sampling(seed=0))
        self.recorder = Recorder(engine, **keep)
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True
        self.engine.cancel()

    def run(self, tokens: int, progress: Callable[[int], None]) -> None:
        """Decode at least `tokens`, shared evenly; where answers end early, in further rounds with other seeds.

        Greedy answers would repeat, so they are asked for once. OffmoeError where a prompt cannot be run.
        """
        once = self.sampling.merged(self.engine.sampling).temperature == 0
        with self.recorder:
            for turn in range(1 if once else tokens):
                before = self.recorder.tokens
                self._turn(turn, tokens, progress)
                if self.stopped or self.recorder.tokens >= tokens or self.recorder.tokens == before:
                    return

    def trace(self) -> Trace:
        chosen = self.sampling.merged(self.engine.sampling)
        temperature = "greedy" if chosen.temperature == 0 else f"temperature {chosen.temperature:g}"
        return self.recorder.trace(phase="decode", sampling=f"{temperature}, seed {chosen.seed}")

    def _turn(self, turn: int, tokens: int, progress: Callable[[int], None]) -> None:
        for index, prompt in enumerate(self.prompts):
            missing = tokens - self.recorder.tokens
            if self.stopped or missing <= 0:
                return
            share = max(-(-missing // (len(self.prompts) - index)), min(LEAST, missing))
            self._answer(prompt, turn, share, progress)

    def _answer(self, prompt: Prompt, turn: int, tokens: int, progress: Callable[[int], None]) -> None:
        engine, before = self.engine, self.recorder.tokens
        self.recorder.label = prompt.kind
        engine.reset()
        # The first token comes from the prompt's logits, and the last one is not run.
        seeded = Sampling(seed=(self.sampling.seed or 0) + turn, max_tokens=tokens + 1).merged(self.sampling)
        try:
            for count, _ in enumerate(engine.generate(given(engine, prompt), seeded)):
                progress(before + count)
                if self.stopped:  # before the engine was told
                    engine.cancel()
        except ContextFull as error:
            raise OffmoeError(f"prompt {str(prompt.given)[:40]!r}: {error}") from None


def given(engine: Engine, prompt: Prompt) -> Any:
    """What Engine.generate takes."""
    if not prompt.raw:
        return prompt.given
    if engine.tokenizer is None:
        raise OffmoeError("raw text needs a tokenizer, and the model has none")
    return engine.tokenizer.encode(prompt.given)
