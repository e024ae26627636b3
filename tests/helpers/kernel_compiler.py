"""Triton's compiler with no GPU: launches that are caught before they happen, and what their kernels compile to.

A launch is compiled for the arguments that it was made with, as Triton would at that launch.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int8: "*i8",
         torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a program may have at most

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """A launch to be compiled for the first of `capabilities`; its PTX serves for the others, too. `extent`: "proven"
    makes PTX for each and compares it, "parsed" ends where Triton's language is understood."""

    launch: Launch
    capabilities: tuple[int, ...]
    extent: str = "assembled"


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """A list of the launches inside, which do not happen."""
    launches: list[Launch] = []
    run = JITFunction.run
    JITFunction.run = lambda kernel, *values, grid, warmup, **named: launches.append((kernel, values, named))
    yield launches
    JITFunction.run = run


def name_of(launch: Launch) -> str:
    """`experts._down`."""
    return f"{launch[0].__module__.rpartition('.')[2]}.{launch[0].__name__}"


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """A launch's kernel with the types of its arguments, and its options. Pointers and whole numbers that divide by 16
    are said to, and 1 is a constant, as at a launch."""
    kernel, values, named = launch
    given = dict(zip(kernel.arg_names, values, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        name, value = param.name, given[param.name]
        one = type(value) is int and value == 1 and not param.do_not_specialize
        aligned = not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        if param.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i64" if abs(value) >= 2**31 else "i32"
            aligned = aligned and value % 16 == 0
        if aligned and name not in constants:
            attributes[i,] = [["tt.divisibility", 16]]
    options = {key: value for key, value in named.items() if key not in kernel.arg_names}
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes), options


def identity(launch: Launch) -> str:
    """The same for launches that compile to the same."""
    source, options = source_of(launch)
    return repr((name_of(launch), source.signature, source.constants, source.attrs, sorted(options.items())))


class Pipeline:
    """The stages of Triton's compiler for one launch and capability, and the metadata that they fill in."""

    def __init__(self, launch: Launch, capability: int) -> None:
        self.source, options = source_of(launch)
        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.options = self.backend.parse_options(options)
        self.stages: dict[str, Any] = {}
        self.backend.add_stages(self.stages, self.options, self.source.language)
        self.metadata: dict[str, Any] = {"target": self.target, **vars(self.options)}

    def parsed(self) -> tuple[Any, Any]:
        """Triton's first IR, and the context that has to outlive it."""
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        functions = self.backend.get_codegen_implementation(self.options)
        module = self.source.make_ir(self.target, self.options, functions, self.backend.get_module_map(), context)
        return self.stages["ttir"](module, self.metadata), context

    def ptx(self) -> str:
        module, _context = self.parsed()
        for stage in ("ttgir", "llir", "ptx"):
            module = self.stages[stage](module, self.metadata)
        return module

    def cubin(self, ptx: str) -> bytes:
        return self.stages["cubin"](ptx, self.metadata)


def retargeted(ptx: str, capability: int) -> str:
    """PTX that names another target."""
    return re.sub(r"(?m)^(\.target sm_)\d+", rf"\g<1>{capability}", ptx)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack, which is where they spill to."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.findall(rf"{name}:(\d+)", said)[-1]) for name in ("REG", "STACK")}


def compiled(job: Job) -> list[dict[str, Any]]:
    """What is to be known of a launch's kernel, for each of the job's capabilities; or why it does not compile.
    Nothing of one that is only parsed."""
    about = {"kernel": name_of(job.launch), "format": format_of(job.launch)}
    try:
        if job.extent == "parsed":
            Pipeline(job.launch, job.capabilities[0]).parsed()
            return []
        return [{**about, **line} for line in measured(job)]
    except Exception as error:  # the next kernel is tried too
        return [{**about, "capability": job.capabilities[0], "error": f"{type(error).__name__}: {error}"}]


def format_of(launch: Launch) -> str | None:
    """The weight format among the constants, `Q4_K+Q5_0` where gate and up have two."""
    named = launch[2]
    first = named.get("FG") or named.get("F0") or named.get("FORMAT")
    return first if named.get("FU") in (None, first) else f"{first}+{named['FU']}"


def measured(job: Job) -> Iterator[dict[str, Any]]:
    """Measurements of PTX and cubin, for each capability."""
    first, *others = job.capabilities
    pipeline = Pipeline(job.launch, first)
    ptx = pipeline.ptx()
    for capability in others if job.extent == "proven" else ():
        if Pipeline(job.launch, capability).ptx() != retargeted(ptx, capability):
            raise AssertionError(f"PTX for sm_{capability} is not that for sm_{first}")
    for capability in job.capabilities:
        cubin = Pipeline(job.launch, capability).cubin(retargeted(ptx, capability))
        yield {
            "capability": capability,
            "warps": pipeline.metadata["num_warps"],
            "shared": pipeline.metadata["shared"],
            "flushing_fma": re.findall(r"fma[.\w]*ftz", ptx),
            "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4", ptx)),
            **resources(cubin),
        }


def all_compiled(jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Lines of `compiled`, as they come. Forked processes have the launches already."""
    global _jobs
    _jobs = jobs
    with ProcessPoolExecutor(processes, get_context("fork"), initializer=silenced) as pool:
        for done in as_completed(pool.submit(nth, n) for n in range(len(jobs))):
            yield from done.result()


_jobs: list[Job] = []


def nth(n: int) -> list[dict[str, Any]]:
    return compiled(_jobs[n])


def silenced() -> None:
    """Triton prints what ptxas refuses."""
    sys.stdout = sys.stderr
