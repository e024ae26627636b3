"""A formula's two expressions as functions of a kernel: their own text, rounded as NumPy rounds it.

Triton divides and takes roots nearly right; the text is changed to call what rounds to nearest. `exp2` and `log2` are
the GPU's approximations: where they differ another expert may leave, and the tokens are the same.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from offmoe.cache.policies import formula
from offmoe.cache.policies.formula import Formula
from offmoe.errors import OffmoeError
from offmoe.kernels.gpu.resolve import evaluate

TWINS: dict[Any, str] = {
    formula.exp2: "exp2", formula.log2: "log2", formula.sqrt: "sqrt_rn", formula.minimum: "minimum",
    formula.maximum: "maximum", formula.where: "where",
}  # fmt: skip
NUMBERS = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)  # of them 1 / 3 is made, for Python to do


def device_formula(policy: Formula, device: torch.device) -> tuple[Any, Any]:
    """`use(value, age, uses)` and `worth(value, age)` for kernels; OffmoeError where Triton cannot compile them."""
    try:
        use, worth = twin(policy.use, 3, policy.values), twin(policy.worth, 2, policy.values)
        ones = torch.ones(2, device=device)  # two: Triton takes one for a truth
        evaluate(ones, ones, ones, use=use, worth=worth)
    except Exception as error:
        raise OffmoeError(
            f"policy {policy.name!r} does not compile for a GPU ({cause(error)}): it runs on the CPU and in replay, "
            "see docs/policies.md"
        ) from error
    return use, worth


def cause(error: BaseException) -> str:
    """Triton wraps an error once for every function around it, and quotes lines of each."""
    while error.__cause__:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def twin(function: Callable[..., Any], inputs: int, values: Mapping[str, Any]) -> Any:
    """The function of its first `inputs` arguments; the others are `values`, float32 as they are for NumPy."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if not (isinstance(function, FunctionType) and isinstance(tree, ast.FunctionDef)):
        raise ValueError("use and worth are not both static methods written with def")
    named = [argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs)]
    lines = [f"{name} = tl.full((), {float(values[name])!r}, tl.float32)" for name in named[inputs:] if name in values]
    tree.decorator_list, tree.returns = [], None
    tree.args = ast.arguments([], [ast.arg(name) for name in named[:inputs]], None, [], [], None, [])
    Twin(function).visit(tree)
    tree.body[:0] = ast.parse("\n".join(lines)).body
    text = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    where = f"<{function.__module__}.{function.__qualname__} {' '.join(lines)}>"
    linecache.cache[where] = (len(text), None, text.splitlines(keepends=True), where)  # Triton asks for the source
    (code,) = (part for part in compile(text, where, "exec").co_consts if isinstance(part, CodeType))
    return triton.jit(FunctionType(code, {"tl": tl, "__name__": function.__module__}))


class Twin(ast.NodeTransformer):
    """Names become what they stand for in a kernel, `/` and sqrt what rounds to nearest, whole numbers floats."""

    def __init__(self, function: FunctionType) -> None:
        self.known = {name: function.__globals__[name] for name in function.__code__.co_names
                      if name in function.__globals__}  # fmt: skip

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.known:
            return node
        found = self.known[node.id]
        if isinstance(found, (int, float)):
            return self.visit_Constant(ast.Constant(found))
        if not (callable(found) and found in TWINS):
            raise ValueError(f"{node.id} is neither a number nor what formula.py exports")
        return ast.parse(f"tl.{TWINS[found]}", mode="eval").body

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(float(node.value)) if type(node.value) is int else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Div) and not all(isinstance(part, NUMBERS) for part in ast.walk(node)):
            return ast.Call(ast.parse("tl.div_rn", mode="eval").body, [node.left, node.right], [])
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """x /= y."""
        assert isinstance(node.target, ast.Name)
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.Assign([node.target], self.visit(value))
