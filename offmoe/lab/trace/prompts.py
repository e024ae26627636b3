"""Prompts for recording traces, of many kinds, each with the name of its kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offmoe.errors import OffmoeError
from offmoe.text.read_text import read_text

KINDS: dict[str, tuple[str, ...]] = {
    "chat": (
        "Hello! How are you today, and what can you help me with?",
        "What should I see in Paris in three days? Give me a plan for every day.",
        "Compare cats and dogs as pets for somebody who works long hours.",
        "Give me a recipe for lentil soup for four people, with amounts and times.",
        "I cannot fall asleep at night. Give me ten tips, each with a reason.",
        "Explain step by step how a bicycle stays upright, as if I were ten years old.",
        "Summarise the causes of the First World War in five points.",
        "My landlord wants to raise the rent by twelve percent. Help me write a polite letter that says no.",
    ),
    "code": (
        "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
        "Write a C program that reads lines from standard input and prints them in reverse order.",
        "Write an SQL query that finds the three customers who spent the most in 2023, and explain each clause.",
        "Show me an HTML page with a form that asks for a name and an e-mail address, and the CSS to centre it.",
    ),
    "maths": (
        "Solve this: a train leaves at 9:40 and drives 210 km at 84 km/h. When does it arrive?",
        "What is 17 * 23 + 144 / 12? Show every step of the calculation.",
        "Solve the equation 3x + 7 = 2x - 5 and check the result.",
        "A box holds 5 red, 3 blue and 2 green balls. What is the probability of drawing two red ones?",
    ),
    "story": (
        "Tell me a short story about a fox who learns to share. Use simple words, and end with a moral.",
        "Write a poem of four stanzas about rain on the sea.",
        "Describe a market in the early morning: the smells, the colours, the voices.",
        "Write a dialogue between a robot and the gardener who found it.",
    ),
    "german": (
        "Erkläre mir in einfachen Worten, warum der Himmel blau ist.",
        "Schreibe eine kurze Geschichte über einen Hund, der das Meer zum ersten Mal sieht.",
    ),
    "french": (
        "Explique-moi comment on fait du pain à la maison, étape par étape.",
        "Raconte une courte histoire d'un chat qui voyage en train.",
    ),
    "spanish": (
        "¿Qué puedo cocinar con arroz, huevos y tomates? Dame una receta detallada.",
        "Describe tu ciudad favorita en diez frases.",
    ),
    "chinese": ("请用简单的话解释一下为什么会有四季。", "写一个关于小猫和月亮的短故事。"),
}
TEXTS: dict[str, tuple[str, ...]] = {  # texts to continue, without the chat template
    "prose": (
        "Once upon a time, in a village at the edge of a great forest, there lived an old clockmaker who",
        "The history of the steam engine begins long before James Watt. In the first century,",
        "The committee met on Tuesday to discuss the new budget. According to the report,",
    ),
    "source": (
        'import csv\n\n\ndef read_rows(path):\n    """Return the rows of a CSV file as dictionaries."""\n',
        "#include <stdio.h>\n#include <stdlib.h>\n\nint main(int argc, char **argv) {\n",
    ),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt of a kind. `given` is an argument of Engine.generate or, if `raw`, text without the chat template."""

    kind: str
    given: Any
    raw: bool = False


BUILT_IN = tuple(Prompt(kind, text) for kind, texts in KINDS.items() for text in texts) + tuple(
    Prompt(kind, text, raw=True) for kind, texts in TEXTS.items() for text in texts
)


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt per line of a UTF-8 file.

    Lines of a .jsonl file are objects with `prompt`, `text` (raw) or `messages`, and optionally `class`. Raises
    OffmoeError that names the invalid line.
    """
    lines = read_text(path).splitlines()
    read = parse_json_line if path.suffix == ".jsonl" else parse_line
    prompts = [read(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise OffmoeError(f"{path} has no prompt: write one per line")
    return prompts


def parse_line(line: str, where: str) -> Prompt:
    return Prompt("", line.strip())


def parse_json_line(line: str, where: str) -> Prompt:
    """Parse an object of a .jsonl file."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise OffmoeError(f"{where} is not JSON: {error}") from None
    names = [name for name in ("prompt", "text", "messages") if isinstance(value, dict) and name in value]
    kinds = {"prompt": str, "text": str, "messages": list}
    if len(names) != 1 or not isinstance(value[names[0]], kinds[names[0]]) or not value[names[0]]:
        raise OffmoeError(f"{where} is not a prompt: expected an object with one of prompt, text or messages")
    if not isinstance(value.get("class", ""), str):
        raise OffmoeError(f"{where}: class is {value['class']!r}, expected a name")
    return Prompt(value.get("class", ""), value[names[0]], raw=names[0] == "text")
