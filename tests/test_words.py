"""The glossary holds: no retired word in code, tests, examples and documentation, and docstrings that begin plainly."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

# Retired words as regular expressions, whole words, and what to write instead.
RETIRED = {
    r"keyless\w*": "recurrent, or linear-attention for a DeltaNet",
    r"\w*unturned\w*": "no-position (NoPE)",
    r"(?<!re)turned(?! off| on| into| out| away| back)": "rotary (RoPE), or transposed",
    r"lying": "transposed, row-major",
    r"upright": "row-major",
    r"tempers?": "attention temperature",
    r"meant_\w+|\w+_meant|meant\s*[=\[(.]": "weight_transform",
    r"besides?": "side_stream, shared_expert, concatenated, next to",
    r"class (Lane|Mark)\b|\b(Lane|Mark)\(": "Stream, Event",
    r"far_\w+|\w+_far|far\s*[=\[(]": "full_attention",
    r"therein|thereof|whatever lies": "a noun",
}
FOLDERS = ("offmoe", "cache", "kernels", "tests", "bench", "examples", "docs")
SUFFIXES = {".py", ".md", ".sh", ".toml"}
SKIPS = 420  # `# fmt: skip`, only where a table gains by it: lower this, never raise it


def files(*suffixes: str) -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return sorted(path for path in {*found, ROOT / "README.md"} if path.suffix in suffixes and path != Path(__file__))


def retired(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, word and replacement of every retired word."""
    for word, instead in RETIRED.items():
        for found in re.finditer(rf"\b(?:{word})", text):
            if word.startswith(("class", "meant", "far")) or re.match(r"\W|$", text[found.end() :]):
                yield text.count("\n", 0, found.start()) + 1, found[0], instead


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


@pytest.mark.fast
def test_no_word_is_retired() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word!r}: write {instead}"
        for path in files(*SUFFIXES)
        for line, word, instead in retired(path.read_text("utf-8"))
    ]
    assert not found, f"{len(found)} retired words\n" + "\n".join(found)


def test_no_docstring_begins_with_of() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in files(".py")
        for line, text in docstrings(ast.parse(path.read_text("utf-8")))
        if text.startswith("Of ")
    ]
    assert not found, f"{len(found)} docstrings begin with Of: begin with a verb or a noun\n" + "\n".join(found)


def test_the_formatter_lays_code_out() -> None:
    counts = {path: path.read_text("utf-8").count("# fmt: " + "skip") for path in files(".py")}
    most = sorted(counts.items(), key=lambda item: -item[1])[:20]
    listed = "\n".join(f"{count} in {path.relative_to(ROOT)}" for path, count in most)
    assert sum(counts.values()) <= SKIPS, f"{sum(counts.values())} lines are exempt, allowed are {SKIPS}\n{listed}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a keyless layer", ["keyless"]),
        ("it returned, as returned values do", []),
        ("the turned half", ["turned"]),
        ("underlying, implying", []),
        ("is meant to be", []),
        ("meant = 1", ["meant ="]),
        ("so far, as far as", []),
        ("far = layers", ["far ="]),
        ("a class Market, a Mark on it", []),
        ("Mark(1)", ["Mark("]),
        ("a temperature", []),
        ("beside the stream", ["beside"]),
    ],
)
def test_words_are_told_apart(text: str, words: list[str]) -> None:
    assert [word for _, word, _ in retired(text)] == words
