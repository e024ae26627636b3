"""Every kernel compiles, with no GPU, for every card that is supported; products read wide and flush nothing.

The ordinary tests compile one launch of each kernel for one capability. `make test-triton` compiles every launch, in
every weight format, for all capabilities, with each supported Triton.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")
import triton
from kernel_compiler import SHARED
from paths import PROGRAMS
from triton.runtime.jit import KernelInterface

from offmoe.kernels import gpu
from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.experts import HEAVY
from offmoe.kernels.gpu.gemv import FEWER_WARPS, WARPS

TRITON = triton.__version__[:3]
SOURCES = sorted(Path(gpu.__path__[0]).rglob("*.py"))
PRODUCTS = {"experts._gate_up", "experts._down", "gemv._dense"}
WIDE = {*PRODUCTS, "page_in._page_in", "route._route", "attention._decode", "prefill._prefill", "mla._attend",
        "deltanet._delta_step"}  # fmt: skip
WEIGHTS = {*PRODUCTS, "gemm._gate_up", "gemm._down", "unpack._unpack", "mla._heads"}  # take every weight format

# Gemma's head, which is to take 168: one program of six runs in a second round.
MORE_REGISTERS = {("gemv._dense", 80, "3.6"): 176}
# Bytes on the stack are read and written all the time, but for what movers hold (see experts.registers): more where
# gate and up have two formats, or are not quantised. The table is what both Tritons take at most.
MOVERS, WIDE_MOVERS = 96, 280
STACK = {
    80: {"gemm._down": 24, "attention._decode": 8, "mla._heads": 8},
    86: {"gemm._down": 24, "attention._decode": 248, "prefill._prefill": 64, "sample._sample": 8},
    89: {"gemm._down": 24, "attention._decode": 248, "prefill._prefill": 64, "sample._sample": 8},
    90: {"gemm._down": 24, "attention._decode": 32, "deltanet._delta_step": 48},
    120: {"gemv._dense": 8, "attention._decode": 24, "prefill._prefill": 56, "deltanet._delta_step": 8},
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, "few", 90), id="few"),
        pytest.param((len(os.sched_getaffinity(0)), "all", *SHARED), id="all", marks=pytest.mark.exhaustive),
    ],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Lines of compile_kernels.py, in a process of its own, for in this one Triton may be its interpreter."""
    return run(tmp_path_factory.mktemp("triton"), "compile_kernels.py", *map(str, request.param))


def run(cache: Path, script: str, *arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-P", str(PROGRAMS / script), *arguments]
    limit = 3600  # all launches for all capabilities take 7 minutes of two idle cores
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_are_compiled_side_by_side_and_not_launched(tmp_path: Path) -> None:
    (found,) = run(tmp_path, "compile_side_by_side.py")
    assert found == {"compiled": ["CompiledKernel", "CompiledKernel"], "untouched": True, "restored": True}


def launched() -> set[str]:
    """`experts._down`: every kernel that some line of kernels/gpu launches, `_down[grid](…)`."""
    return {
        f"{path.stem}.{call.func.value.id}"
        for path in SOURCES
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }


def test_all_kernels_compile(made: list[dict[str, Any]]) -> None:
    assert not [line for line in made if "error" in line]
    for capability in {line["capability"] for line in made}:
        assert {line["kernel"] for line in made if line["capability"] == capability} == launched()


def test_kernels_fit_the_multiprocessor(made: list[dict[str, Any]]) -> None:
    for line in made:
        assert line["shared"] <= SHARED[line["capability"]], line
        assert line["stack"] <= allowed(line), line


def allowed(line: dict[str, Any]) -> int:
    """Bytes of stack. `_down` may have many only where a row takes as many warps as there can be."""
    if line["kernel"] == "experts._gate_up":
        return WIDE_MOVERS if line["format"] in ("F32", "Q4_K+Q5_0") else MOVERS
    if line["kernel"] == "experts._down":
        return 376 if line["warps"] == 32 else 8 if line["format"] == "F32" else 0
    return STACK[line["capability"]].get(line["kernel"], 0)


@pytest.mark.exhaustive
def test_every_weight_format_is_compiled(made: list[dict[str, Any]]) -> None:
    for capability in SHARED:
        for kernel in WEIGHTS:
            lines = [line for line in made if (line["kernel"], line["capability"]) == (kernel, capability)]
            assert {line["format"] for line in lines} >= FORMATS.keys(), (kernel, capability)


def test_products_read_wide_words_and_flush_nothing(made: list[dict[str, Any]]) -> None:
    """A subnormal that is flushed would make every weight 0: see kernels.gpu.dot."""
    assert not [line for line in made if line["kernel"] in WIDE and not line["wide_loads"]]
    assert not [line for line in made if line["kernel"] in PRODUCTS and line["flushing_fma"]]


def test_as_many_warps_run_at_once_as_a_launch_counts_on(made: list[dict[str, Any]]) -> None:
    """gemv.WARPS and FEWER_WARPS of 65,536 registers; one more and a second round begins."""
    products = [line for line in made if line["kernel"] in PRODUCTS]
    assert {line["format"] for line in products} & HEAVY
    assert {line["warps"] for line in products} >= {1, 4, 32}
    for line in products:
        heavy = line["kernel"] == "gemv._dense" or (
            line["kernel"] == "experts._gate_up" and HEAVY & set(line["format"].split("+"))
        )
        registers = 65536 // 32 // max(line["warps"], FEWER_WARPS if heavy else WARPS)
        assert line["reg"] <= max(registers, MORE_REGISTERS.get((line["kernel"], line["capability"], TRITON), 0)), line


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_constant_comes_out_of_a_jitted_function(path: Path) -> None:
    """Triton 3.6 returns a tensor from every jitted function, tl.cdiv among them, also where 3.7 returns a constant:
    constants come out of arithmetic, triton.cdiv, or a triton.constexpr_function."""
    parts = path.relative_to(gpu.__path__[0]).with_suffix("").parts
    module = import_module(".".join((gpu.__name__, *parts)))
    for line in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(line, ast.AnnAssign) and line.value and ast.unparse(line.annotation) == "tl.constexpr":
            for call in ast.walk(line.value):
                assert not (isinstance(call, ast.Call) and jitted(call.func, module)), ast.unparse(line)


def jitted(function: ast.expr, module: ModuleType) -> bool:
    """Whether a name, `words` or `tl.cdiv`, is a function in @triton.jit (interpreted here)."""
    found: Any = module
    for name in ast.unparse(function).split("."):
        found = getattr(found, name, None)
    return isinstance(found, KernelInterface)
