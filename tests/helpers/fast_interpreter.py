"""Triton's interpreter in a third of its time.

It patches all of triton.language anew for every function that a kernel calls, which is 40 % of it, and does every sum
and product of whole numbers twice, to see whether it overflows. What this hooks into is private.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


def patch_once() -> None:
    """A module's functions see triton.language patched from their first launch on, for good."""
    patch, patched = interpreter._patch_lang, set()

    def once(function: Any) -> Any:
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


@contextmanager
def overflow_unchecked() -> Iterator[None]:
    """For whole models: each kernel's own tests look for overflow."""
    builder = interpreter.interpreter_builder
    checked = builder.options
    builder.options = replace(checked, sanitize_overflow=False)
    yield
    builder.options = checked
