"""Triton's interpreter in a fraction of its time.

It patches all of triton.language anew for every function that a kernel calls (40 % of its time), builds the type, the
shape and their names of every intermediate tensor from nothing (another third), and computes every sum and product of
integers twice, to see whether it overflows. What this module hooks into is private to Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from triton.language import core
from triton.runtime import interpreter


def install() -> None:
    """Make the interpreter fast, once, before the first launch."""
    patch_once()
    interpreter._get_np_dtype = numpy_type_of
    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor


def patch_once() -> None:
    """Let each module's functions see triton.language patched from their first launch on, for good."""
    patch, patched = interpreter._patch_lang, set()

    def once(function: Any) -> Any:
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


make_type, numpy_type = core.block_type.__init__, interpreter._get_np_dtype
PARTS: dict[Any, dict[str, Any]] = {}  # (element type's name, address space, constant, sizes) -> attributes
NUMPY_TYPES: dict[str, Any] = {}


def block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """Initialise a block type, with the shape and size that its tensors have as constexprs."""
    sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
    pointer = isinstance(element_ty, core.pointer_type)
    key = element_ty.name, sizes, pointer and (element_ty.address_space, element_ty.const)
    if key not in PARTS:
        make_type(self, element_ty, list(sizes))
        constants = core.tuple([core.constexpr(size) for size in sizes])
        PARTS[key] = {**vars(self), "constexpr_shape": constants, "constexpr_numel": core.constexpr(self.numel)}
    self.__dict__.update(PARTS[key])


NO_SHAPE, ONE = core.tuple([]), core.constexpr(1)


def tensor(self: Any, handle: Any, type: Any) -> None:
    """Initialise a tensor with what its type has prepared."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    block = isinstance(type, core.block_type)
    self.shape, self.numel = (type.constexpr_shape, type.constexpr_numel) if block else (NO_SHAPE, ONE)


def numpy_type_of(dtype: Any) -> Any:
    """Look NumPy's type up by the name of Triton's."""
    name = dtype.scalar.name
    if name not in NUMPY_TYPES:
        NUMPY_TYPES[name] = numpy_type(dtype)
    return NUMPY_TYPES[name]


@contextmanager
def overflow_unchecked() -> Iterator[None]:
    """Leave out the overflow checks, for whole models: each kernel's own tests look for overflow."""
    builder = interpreter.interpreter_builder
    checked = builder.options
    builder.options = replace(checked, sanitize_overflow=False)
    yield
    builder.options = checked
