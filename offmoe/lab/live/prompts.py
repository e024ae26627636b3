"""What is asked while measuring: real questions of many kinds. Synthetic ones flatter caches."""

from __future__ import annotations

from pathlib import Path

from offmoe.errors import OffmoeError
from offmoe.lab.trace.prompts import KINDS, Prompt, read_prompts
from offmoe.text.tokenizer import Tokenizer

LEAST = 5  # different prompts
PROMPTS = tuple(Prompt(kind, texts[at]) for at in range(2) for kind, texts in KINDS.items())


def prompts_of(path: Path | None) -> list[Prompt]:
    """The built-in ones, or a file's as `trace record` reads it; OffmoeError unless enough are different."""
    if path is None:
        return list(PROMPTS)
    prompts = list({repr(prompt.given): prompt for prompt in read_prompts(path)}.values())
    if len(prompts) < LEAST:
        raise OffmoeError(f"{path} holds {len(prompts)} different prompts: at least {LEAST} are needed")
    return prompts


def encoded(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Through the chat template, where there is one and the prompt is not raw."""
    if isinstance(prompt.given, list):
        return tokenizer.encode_chat(prompt.given)
    if prompt.raw or tokenizer.chat_template is None:
        return tokenizer.encode(prompt.given)
    return tokenizer.encode_chat([{"role": "user", "content": prompt.given}])
