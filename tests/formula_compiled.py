"""Compiles a Formula for a GPU that need not be there: `python -P formula_compiled.py FILE.py:CLASS`, PTX out."""

from __future__ import annotations

import sys
import types

import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offmoe.cache.plugin import load_plugin
from offmoe.cache.policies.formula import Formula

NAMES = {name: getattr(tl, name) for name in ("exp2", "log2", "sqrt", "minimum", "maximum", "where")}


def jitted(function):  # type: ignore[no-untyped-def]
    """The same text, with a kernel's functions behind the names that formula.py exports."""
    twin = types.FunctionType(function.__code__, {**function.__globals__, **NAMES}, function.__name__)
    return triton.jit(twin)


@triton.jit
def evaluate(value, age, out, h, USE: tl.constexpr, WORTH: tl.constexpr):
    i = tl.arange(0, 128)
    v, a = tl.load(value + i), tl.load(age + i)
    tl.store(out + i, WORTH(USE(v, a, v * 0 + 1.0, h), a, h))


if __name__ == "__main__":
    kind, _, _ = load_plugin(sys.argv[1], Formula)  # type: ignore[type-abstract]
    types_of = {"value": "*fp32", "age": "*fp32", "out": "*fp32", "h": "fp32"}
    functions = {"USE": jitted(kind.use), "WORTH": jitted(kind.worth)}
    source = ASTSource(evaluate, types_of | dict.fromkeys(functions, "constexpr"), constexprs=functions)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
