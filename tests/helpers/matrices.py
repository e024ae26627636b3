"""Parametrisations whose default run is a part that tells: the rest is marked `exhaustive` (make test-all)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import product
from typing import Any

import pytest


def some(cases: Iterable[Any], telling: Collection[Any]) -> list[Any]:
    """Return all cases, those that are not among the telling ones as exhaustive."""
    cases = list(cases)
    assert all(case in cases for case in telling), f"{telling} are not all among {cases}"
    return [case if case in telling else exhaustive(case) for case in cases]


def diagonal(*axes: Iterable[Any], telling: Callable[..., bool] = lambda *_: True) -> list[Any]:
    """Return every combination of the axes' values. The default run has the i-th of each axis, over and over until the
    longest axis ends, so that each value appears; of these `telling` may drop some. The others are exhaustive."""
    lists = [list(axis) for axis in axes]
    chosen = {tuple(i % len(values) for values in lists) for i in range(max(map(len, lists)))}
    cases = []
    for at in product(*(range(len(values)) for values in lists)):
        case = tuple(values[i] for values, i in zip(lists, at, strict=True))
        cases.append(case if at in chosen and telling(*case) else exhaustive(case))
    return cases


def exhaustive(case: Any) -> Any:
    """Mark one case; a tuple stands for several arguments."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive)
