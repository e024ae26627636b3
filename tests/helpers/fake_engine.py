"""A stand-in for offmoe.engine without a model: it echoes prompts, thinks on request, and counts until stopped.

Run as a program, it is `offmoe` with this engine: `python tests/helpers/fake_engine.py chat`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from offmoe.errors import ContextFull, OffmoeError
from offmoe.settings import SAMPLING_DEFAULTS
from offmoe.stats.stats import Roof, Stats

SLOW_S = 0.2  # each of what comes before the first token of the answer to "slow", and after the last one
CTX = 3  # messages that fit into the context
STATS = Stats(
    tokens=3, finish_reason="stop", prompt_tokens=5, reused_tokens=1, prefill_tok_s=100.0,
    decode_tok_s=61.25, ttft_s=0.213, hit_rate=0.612, covered=0.0, late=0.0, misses_per_token=2.5,
    pcie_bytes_per_token=3.6 * 2**20, nvme_bytes_per_token=0.0, nvme_record_bytes_per_token=0.0, stall_ms_per_token=1.0,
    roof=Roof(87.5, "floor", "the fastest token of this session"), policy="lru layer", vram_bytes=2**20,
    ram_bytes=2**21,
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    text: str
    token: int | None
    reasoning: bool = False


class Engine:
    """`prompts` are all prompts it was given."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab=100)
        self.sampling = SAMPLING_DEFAULTS
        self.plan = SimpleNamespace(summary=lambda: "12 of 12 experts in slots", ctx=1000)
        self.tokenizer = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
        self.notes: list[str] = []
        self.prompt_notes: list[str] = []
        self.prompts: list[Any] = []
        self.settings: dict[str, Any] = {}
        self.answer_tokens: list[int] = []
        self.answer_is_plain = True
        self.resets = 0
        self.pauses: list[float] = []

    @classmethod
    def load(cls, model: str, progress: Any = None, think: str | None = None, settings: Any = None) -> Engine:
        engine = cls()
        time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")))
        if think is not None:
            engine.think(think)
        engine.settings = settings
        return engine

    def generate(self, prompt: Any, sampling: Any = None) -> Iterator[Piece]:
        self.prompts.append(prompt)
        self.slow = SLOW_S if "slow" in str(prompt) else 0.0
        time.sleep(self.slow)
        self.cancelled, self.answer_tokens = False, []
        messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
        self.prompt_notes = ["the template leaves it out"] if "dropped" in str(messages[0]) else []
        if len(messages) > CTX:
            raise ContextFull(len(messages), CTX, len(messages))
        return self._answer(str(messages[-1]["content"] if isinstance(messages[-1], dict) else messages))

    def _answer(self, text: str) -> Iterator[Piece]:
        time.sleep(self.slow)
        if text == "fail":
            raise OffmoeError("the disk\nis gone")
        if text == "erase":
            text = "\x1b[2J\x1b[Hred"
        thoughts, _, text = text.rpartition(" => ")  # "why => this": the answer to it is this, after some thought
        self.answer_is_plain = not thoughts
        for word in thoughts.split():
            time.sleep(0.05)
            self.answer_tokens.append(0)
            yield Piece(word + " ", 0, reasoning=True)
        words = (str(number) for number in range(1000)) if text == "count" else iter(text.split(" "))
        for token, word in enumerate(words):
            if self.cancelled:
                break
            time.sleep(0.01 if text == "count" else 0)
            self.answer_tokens.append(token % 100)
            yield Piece(word + " ", token)

    def cancel(self) -> None:
        self.cancelled = True

    def paused(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def stats(self) -> Stats:
        time.sleep(self.slow)
        reason = "cancelled" if self.cancelled else os.environ.get("FAKE_FINISH", "stop")
        return replace(STATS, tokens=len(self.answer_tokens), finish_reason=reason)

    def loading(self) -> str | None:
        return None

    def think(self, value: str | None) -> None:
        if value not in (None, "on", "off"):
            raise OffmoeError(f"the template does not accept {value!r}")
        self.thinking = value

    def reset(self) -> None:
        self.resets += 1

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None: ...


if __name__ == "__main__":
    sys.modules["offmoe.engine"] = sys.modules["__main__"]
    from offmoe.app.cli import main

    sys.exit(main())
