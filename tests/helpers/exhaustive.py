"""Parameters of tests in two tiers: the default run takes telling ones, `make test-all` the whole matrix."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Return parameters for `values` (tuples are several arguments); those not in `default` are marked exhaustive."""
    values = list(values)
    unknown = [value for value in default if value not in values]
    assert not unknown, f"{unknown} are not among the values"
    marks = {True: (), False: pytest.mark.exhaustive}
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks[value in default])
        for value in values
    ]


def where_present(values: Iterable[Any], present: bool, reason: str) -> list[Any]:
    """Return parameters for `values`, or a single one that is skipped where what all of them need is absent."""
    values = list(values)
    if present:
        return values
    count = len(values[0]) if isinstance(values[0], tuple) else 1
    return [pytest.param(*[None] * count, marks=pytest.mark.skip(reason), id="absent")]
