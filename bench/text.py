"""Time of text processing: tokenising a megabyte, and parsing an answer token by token.

    python -P bench/text.py [MODEL …] > bench/results/text.csv

MODEL is by default the demo; a GGUF with only a vocabulary is enough. Times are CPU seconds of one core, the minimum of
five runs: other work on the machine does not count. The text is this project's own, prose and code.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # read by the tokenizers library on import

from offmoe.checkpoint.find_model import DEMO
from offmoe.checkpoint.open import open_checkpoint
from offmoe.text.tokenizer import Tokenizer, load_tokenizer

ROUNDS, SIZE = 5, 1_000_000
COLUMNS = ("vocabulary", "cut", "figure", "value", "unit", "target")
ROOT = Path(__file__).parents[1]


def corpus() -> str:
    files = sorted(file for kind in ("*.md", "*.py") for file in ROOT.glob(f"[!.]*/**/{kind}"))
    text = "".join(file.read_text("utf-8") for file in [ROOT / "README.md", *files])
    return (text * (1 + SIZE // len(text))).encode()[:SIZE].decode(errors="ignore")


def min_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of the fastest run."""
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def rows(tokenizer: Tokenizer, text: str) -> list[tuple[str, float, str, float]]:
    ids = tokenizer.encode(text)

    def parse_answer() -> None:
        parser = tokenizer.answer_parser(ids[:100], ["never said"])
        for id in ids:
            parser.push(id)

    return [
        ("tokenise 1 MB", min_seconds(lambda: tokenizer.encode(text)), "s", 0.5),
        ("detokenise, streaming", 1e6 * min_seconds(parse_answer) / len(ids), "µs a token", 20),
    ]


def main() -> None:
    out, text = csv.writer(sys.stdout, lineterminator="\n"), corpus()
    out.writerow(COLUMNS)
    for path in map(Path, sys.argv[1:] or [DEMO]):
        with open_checkpoint(path) as checkpoint:
            tokenizer = load_tokenizer(checkpoint)
            pre_tokenizer = checkpoint.metadata.get("tokenizer.ggml.pre", "") if checkpoint.kind == "gguf" else ""
        for figure, value, unit, target in rows(tokenizer, text):
            out.writerow((path.stem, pre_tokenizer, figure, f"{value:.3g}", unit, target))
        tokenizer.close()


if __name__ == "__main__":
    main()
