"""What is asked while measuring: real questions, through the chat template. Synthetic ones flatter caches."""

from __future__ import annotations

from pathlib import Path

from offmoe.errors import OffmoeError
from offmoe.terminal import decode

PROMPTS = (
    "Tell me a short story about a fox who learns to share. Use simple words, and end with a moral.",
    "Explain step by step how a bicycle stays upright, as if I were ten years old.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "What should I see in Paris in three days? Give me a plan for every day.",
    "My landlord wants to raise the rent by twelve percent. Help me write a polite letter that says no.",
    "Compare cats and dogs as pets for somebody who works long hours.",
    "Solve this: a train leaves at 9:40 and drives 210 km at 84 km/h. When does it arrive?",
    "Erkläre mir in einfachen Worten, warum der Himmel blau ist.",
    "Give me a recipe for lentil soup for four people, with amounts and times.",
    "Summarise the causes of the First World War in five points.",
)


def read_prompts(path: Path | None) -> list[str]:
    """The built-in ones, or one a line of a UTF-8 file; OffmoeError unless there are five different ones."""
    if path is None:
        return list(PROMPTS)
    try:
        text = decode(path.read_bytes(), source=str(path))
    except OSError as error:
        raise OffmoeError(f"cannot read {path}: {error.strerror}") from None
    prompts = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(prompts) < 5:
        raise OffmoeError(f"{path} holds {len(prompts)} different prompts, one a line: at least 5 are needed")
    return prompts
