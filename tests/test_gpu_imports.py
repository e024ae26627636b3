"""Names that tests/gpu and bench/ import exist: without a GPU nothing else would notice a rename."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec

import pytest
from paths import HELPERS, ROOT

pytest.importorskip("triton")
FILES = sorted([*ROOT.glob("tests/gpu/*.py"), *ROOT.glob("bench/**/*.py")])
OURS = {"offmoe", *(path.stem for path in HELPERS.glob("*.py"))}


def imported(source: str) -> list[tuple[str, str]]:
    """Return (module, name) of every `from module import name` of offmoe and of tests/helpers, inside functions too."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OURS
        for alias in node.names
    ]


def exists(module: str, name: str) -> bool:
    """Whether the module has it, as an attribute or as a module within."""
    parent = importlib.import_module(module)
    return hasattr(parent, name) or (hasattr(parent, "__path__") and find_spec(f"{module}.{name}") is not None)


def test_every_name_exists() -> None:
    missing = [
        f"{path.relative_to(ROOT)}: from {module} import {name}"
        for path in FILES
        for module, name in imported(path.read_text("utf-8"))
        if not exists(module, name)
    ]
    assert not missing, "\n".join(missing)


def test_a_name_that_is_gone_is_seen() -> None:
    (line,) = imported("def f():\n    from offmoe.engine import Motor")
    assert line == ("offmoe.engine", "Motor")
    assert not exists(*line)
