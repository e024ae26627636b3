"""Ten thousand random texts from all of Unicode."""

from __future__ import annotations

import random
from functools import cache

# Code points by kind, equally likely: a text of all of Unicode alone would be rare planes and nothing else.
RANGES = {
    "ascii": [(0x20, 0x7E)] * 3,
    "control": [(0x00, 0x1F), (0x7F, 0xA0), (0x200B, 0x200F), (0x2028, 0x202E), (0xFEFF, 0xFEFF)],
    "spaces": [(0x20, 0x20), (0x09, 0x0D), (0xA0, 0xA0), (0x2000, 0x200A), (0x3000, 0x3000)],
    "latin": [(0xA1, 0x24F), (0x1E00, 0x1EFF)],
    "combining": [(0x300, 0x36F), (0x20D0, 0x20F0), (0xFE00, 0xFE0F)],
    "right to left": [(0x5D0, 0x5EA), (0x600, 0x6FF), (0x591, 0x5C7)],
    "scripts": [(0x370, 0x52F), (0x900, 0x97F), (0xE01, 0xE3A), (0x1780, 0x17DD)],
    "cjk": [(0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3), (0xFF01, 0xFF60)],
    "emoji": [(0x1F300, 0x1FAFF), (0x200D, 0x200D), (0x1F3FB, 0x1F3FF), (0x1F1E6, 0x1F1FF)],
    "numbers": [(0x30, 0x39), (0xB2, 0xB3), (0x2150, 0x218B), (0x660, 0x669)],
    "any": [(0x00, 0xD7FF), (0xE000, 0x10FFFF)],
}


@cache
def texts() -> list[str]:
    chance = random.Random(6)

    def letter() -> str:
        return chr(chance.randint(*chance.choice(RANGES[chance.choice(kinds)])))

    made = []
    for _ in range(10_000):
        kinds = chance.sample(list(RANGES), 3)
        made.append("".join(letter() for _ in range(chance.randint(1, 24))))
    return [text.replace("▁", "_") for text in made]  # sentencepiece's own sign for a space
