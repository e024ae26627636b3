"""Every kernel compiles, with no GPU, for the oldest cards that have bfloat16, for Hopper and for what stands on a desk
today; products read wide and flush nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")
from paths import PROGRAMS

from offmoe.kernels.gpu.experts import HEAVY
from offmoe.kernels.gpu.gemv import FEWER_WARPS, WARPS

PRODUCTS = {"experts._gate_up", "experts._down", "gemv._dense"}
WIDE = {*PRODUCTS, "page_in._page_in", "route._route", "attention._decode", "prefill._prefill", "mla._attend",
        "deltanet._delta_step"}  # fmt: skip
KERNELS = {*WIDE, "resolve._candidates", "route._predict", "embed._embed", "sample._sample", "advance._advance",
           "request._request", "foretell._remember", "foretell._compare", "foretell._foretell", "gemm._plan_tiles",
           "gemm._gate_up", "gemm._down", "gemm._combine", "unpack._unpack", "norm_rope._norm_rope_write",
           "norm_rope._rms_norm", "sandwich._attended", "sandwich._fed", "mla._heads", "deltanet._convolve",
           "deltanet._recur", "deltanet._gate", "shortconv._conv_step", "shortconv._conv_chunk"}  # fmt: skip


# Bytes on the stack are read and written all the time, but for what movers hold: see experts.registers. No product is
# here, but for the head's on sm_120, and one whose row takes as many warps as there can be.
STACK = {
    80: {"experts._gate_up": 48, "gemm._down": 24, "experts._down": 328},
    90: {"experts._gate_up": 64, "gemm._down": 24, "experts._down": 328},
    120: {"experts._gate_up": 96, "experts._down": 376, "gemv._dense": 8, "prefill._prefill": 48},
}
SHARED = {80: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes that a program may have; the first is sm_86's and sm_89's


@pytest.fixture(scope="module", params=STACK, ids=[f"sm_{capability}" for capability in STACK])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a process of its own, for in this one Triton may be its interpreter; nothing comes out of an old cache."""
    lines = run(tmp_path_factory.mktemp("triton"), "compile_kernels.py", str(request.param))
    return [{**line, "capability": request.param} for line in lines]


def run(cache: Path, script: str, *arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-P", str(PROGRAMS / script), *arguments]
    limit = 900  # 5 minutes on an idle core
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_are_compiled_side_by_side_and_not_launched(tmp_path: Path) -> None:
    (found,) = run(tmp_path, "compile_side_by_side.py")
    assert found == {"compiled": ["CompiledKernel", "CompiledKernel"], "untouched": True, "restored": True}


def test_all_kernels_compile(made: list[dict[str, Any]]) -> None:
    assert not [line for line in made if "error" in line]
    assert {line["kernel"] for line in made} == KERNELS
    for line in made:
        allowed = STACK[line["capability"]].get(line["kernel"], 0)
        assert line["stack"] <= (0 if line["kernel"] == "experts._down" and line["warps"] < 32 else allowed), line
        assert line["shared"] <= SHARED[line["capability"]], line


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
        heavy = line["kernel"] == "gemv._dense" or (line["kernel"] == "experts._gate_up" and line["format"] in HEAVY)
        assert line["reg"] <= 65536 // 32 // max(line["warps"], FEWER_WARPS if heavy else WARPS), line
