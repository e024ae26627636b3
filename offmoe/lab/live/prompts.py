"""Prompts of live measurements: real questions of many kinds, because synthetic ones flatter caches."""

from __future__ import annotations

from pathlib import Path

from offmoe.errors import OffmoeError
from offmoe.lab.trace.prompts import KINDS, Prompt, read_prompts
from offmoe.text.tokenizer import Tokenizer

MIN_PROMPTS = 5  # number of different prompts
PROMPTS = tuple(Prompt(kind, texts[at]) for at in range(2) for kind, texts in KINDS.items())


def load_prompts(path: Path | None) -> list[Prompt]:
    """Return the built-in prompts, or those of a file. Raises OffmoeError if fewer than MIN_PROMPTS are different."""
    if path is None:
        return list(PROMPTS)
    prompts = list({repr(prompt.given): prompt for prompt in read_prompts(path)}.values())
    if len(prompts) < MIN_PROMPTS:
        raise OffmoeError(f"{path} has {len(prompts)} different prompts: at least {MIN_PROMPTS} are needed")
    return prompts


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, through the chat template if there is one and the prompt is not raw."""
    if isinstance(prompt.given, list):
        return tokenizer.encode_chat(prompt.given)
    if prompt.raw or tokenizer.chat_template is None:
        return tokenizer.encode(prompt.given)
    return tokenizer.encode_chat([{"role": "user", "content": prompt.given}])
