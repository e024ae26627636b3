"""Parts of quantised matrices: tensors that form one matrix together, found by name and checked by type and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from offmoe.checkpoint.base import TensorInfo, quote

Shape = tuple[int, ...]


class MisfitError(Exception):
    """Raised where tensors do not form a matrix; a refusal of that matrix, not of the model, which may not need it."""


class Parts:
    """All tensors of a checkpoint; `used` are those that have become part of a matrix."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors, self.used = tensors, set[str]()

    def find(self, name: str, kinds: tuple[str, ...], *shapes: Shape) -> TensorInfo:
        """Return a tensor. Raises MisfitError unless it has one of the types and one of the shapes."""
        info = self.tensors.get(name)
        if info is None or info.format not in kinds or info.shape not in shapes:
            raise misfit(name, info, kinds, str(list(shapes[0])))
        self.used.add(name)
        return info

    def first(self, *names: str) -> str:
        """Return the first name that exists; if none does, the first of all."""
        return next((name for name in names if name in self.tensors), names[0])

    def matrix(self, codes: TensorInfo, name: str, form: Callable[[TensorInfo], TensorInfo]) -> TensorInfo:
        """Return the matrix `name` that `form` makes of its codes; if that raises MisfitError, its refusal."""
        try:
            matrix = form(codes)
        except MisfitError as error:
            return replace(codes, name=name, refusal=f"is no matrix that offmoe can read: {error}")
        self.used.add(codes.name)
        return matrix


def misfit(name: str, info: TensorInfo | None, kinds: tuple[str, ...], wanted: str) -> MisfitError:
    """Return the error for a tensor of the wrong type or shape; `info` None: it is missing."""
    found = f"{info.format} {list(info.shape)}" if info else "missing"
    return MisfitError(f"{quote(name)} is {found}: expected {' or '.join(kinds)} {wanted}")
