"""The field's words: no retired name comes back, and every docstring begins as a definition does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

CODE = ("offmoe", "cache", "kernels", "tests", "bench", "examples")
PROSE = ("README.md", "CONTRIBUTING.md", "docs")
RETIRED = {
    r"keyless": "recurrent (layer)",
    r"unturned|turned(?! (?:into|out|on|off))": "rotated, rotary or RoPE; no-position or NoPE; transposed",
    r"temper(s|ed)?": "attention temperature",
    r"lying|upright(?!, as if)": "transposed, row-major",
    r"beside": "in addition to, next to; shared_expert, side_stream, concatenated",
    r"likewise": "the same, or say it",
    r"whoever|whomever": "a noun",
    r"meant": "weight_transform, effective (weights)",
    r"class (?:Lane|Mark|Copy)": "Stream, Event, Snapshot",
    r"place_of|config\.places": "moe_layer",
}
HERE = Path(__file__).resolve()
MOST_UNFORMATTED = 232  # a table of defaults in each family is among them


def files(*folders: str) -> Iterator[Path]:
    """Yield the text files under `folders`, this file aside."""
    for folder in folders:
        path = ROOT / folder
        found = [path] if path.is_file() else sorted((*path.rglob("*.py"), *path.rglob("*.md"), *path.rglob("*.sh")))
        yield from (file for file in found if file != HERE and "results" not in file.parts)


def test_retired_words_stay_retired() -> None:
    pattern = re.compile("|".join(rf"(?<![\w-])(?:{word})(?![\w-])" for word in RETIRED), re.IGNORECASE)
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match[0]}"
        for file in files(*CODE, *PROSE)
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        for match in pattern.finditer(line)
    ]
    words = "; ".join(f"{word} -> {better}" for word, better in RETIRED.items())
    assert not found, f"{words}:\n" + "\n".join(found)


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for file in files(*CODE):
        if file.suffix == ".py":
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node) or ""
                    if re.match(r"Of\b" if "tests" in file.parts else r"(Of|What|Who)\b", text):
                        found.append(f"{file.relative_to(ROOT)}: {getattr(node, 'name', 'module')}: {text[:60]}")
    assert not found, "begin with a verb or a noun:\n" + "\n".join(found)


def test_code_is_laid_out_by_the_formatter() -> None:
    count = sum(file.read_text("utf-8").count("# fmt: skip") for file in files(*CODE[:3]) if file.suffix == ".py")
    assert count <= MOST_UNFORMATTED, f"{count} lines say fmt: skip: let ruff format lay them out"
