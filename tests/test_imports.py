"""Imports run down, none could run code out of a checkpoint, and --help does not wait for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest
from paths import ROOT

FOLDERS = {"offmoe": ROOT / "offmoe", "offmoe.cache": ROOT / "cache", "offmoe.kernels": ROOT / "kernels"}
# Rooms from the ground up: a module imports from its own room and from those before it. A name is a folder or a file.
ROOMS = (
    ("errors", "settings", "prefetch", "cache", "kernels"),
    ("checkpoint",),
    ("machine",),
    ("mixers",),
    ("models",),
    ("text", "trunk"),
    ("plan",),
    ("experts",),
    ("stats",),
    ("decode", "prefill"),
    ("one_answer", "engine"),
    ("pack",),
    ("app", "__main__"),
    ("lab",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its installed name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = ast.parse(path.read_text("utf-8"), path)
    return found


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that `tree` imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            yield str(node.module)
            yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES)


def level(module: str) -> int:
    """Level of a module's room; the package's own names (`offmoe.load`, `offmoe.__version__`) are everyone's."""
    return LEVEL[module.split(".")[1]] if module.count(".") else 0


def test_the_walk_sees_all_three_folders() -> None:
    assert {"offmoe.app.cli", "offmoe.cache.residency", "offmoe.kernels.formats"} <= set(MODULES)


@pytest.mark.parametrize(
    ("package", "allowed"), [("offmoe.cache", {"numpy"}), ("offmoe.kernels", {"torch", "numpy", "triton"})]
)
def test_the_lowest_packages_import_only_themselves(package: str, allowed: set[str]) -> None:
    for name, tree in MODULES.items():
        if name.startswith(package):
            outside = {module for module in imports(tree) if not module.startswith((package, "__future__"))}
            strange = {module.split(".")[0] for module in outside} - allowed - set(sys.stdlib_module_names)
            assert not strange, f"{name} imports {strange}"


def test_every_module_has_a_room() -> None:
    assert {name.split(".")[1] for name in MODULES if "." in name} - {"demo"} == set(LEVEL)


def test_imports_run_down() -> None:
    """Imports inside functions and those for a type checker alone are imports too."""
    for name, tree in MODULES.items():
        if name in ("offmoe", "offmoe.demo"):
            continue  # the front door imports the engine when it is asked for it
        for module in imports(tree):
            if module.startswith("offmoe."):
                assert level(module) <= level(name), f"{name} imports {module}"


def test_no_imports_run_in_a_circle() -> None:
    """Between modules of one room too, whatever they are imported for."""
    graph = {
        name: {
            module
            for module in imports(tree)
            if module in MODULES and module != name and not name.startswith(module + ".")
        }
        for name, tree in MODULES.items()
        if name != "offmoe"
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for module in sorted(graph.get(name, ())):
                visit(module, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_nothing_imports_tests_or_bench() -> None:
    for name, tree in MODULES.items():
        assert not {module for module in imports(tree) if module.split(".")[0] in ("tests", "bench", "pytest")}, name


def test_nothing_can_run_code_out_of_a_checkpoint() -> None:
    modules = {"pickle", "marshal", "shelve", "dill", "joblib", "transformers"}
    words_of_danger = {"torch.load", "eval", "exec", "trust_remote_code", "allow_pickle=True"}
    for name, tree in MODULES.items():
        assert not modules & {module.split(".")[0] for module in imports(tree)}, name
        for node in ast.walk(tree):
            words = {ast.unparse(node.func)} if isinstance(node, ast.Call) else set()
            words |= {str(node.arg), ast.unparse(node)} if isinstance(node, ast.keyword) else set()
            assert not words & words_of_danger, name


def test_nothing_imports_the_compiler_of_torch() -> None:
    """torch._dynamo and what it brings along (sympy, torch.distributed): 4 s, which a first prompt waited for."""
    names = [name for name in MODULES if not name.endswith("__main__")]
    check = (
        f"import importlib, sys; list(map(importlib.import_module, {names})); sys.exit('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize("code", ["import offmoe", "from offmoe.app.cli import main; main()"])
def test_torch_is_not_imported_before_it_is_needed(code: str) -> None:
    check = f"import sys; sys.argv = ['offmoe', '--help']; {code}; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr.decode()
