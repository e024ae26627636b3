"""Copies of records into slots, naive: rows in RAM are rearranged and stored."""

from __future__ import annotations

from torch import Tensor

from offmoe.kernels.planes import SlotLayout, into_planes


def page_in(
    rows: Tensor, records: Tensor, count: Tensor, slots: Tensor, target: Tensor, layout: SlotLayout, *,
    landed: Tensor | None = None,
) -> None:  # fmt: skip
    """Copy the first `count` [1] of `records` [n], rows of `rows` [R, ≥ record bytes] uint8, into slots [n] of
    target [S, stride]. `landed` [S] int32: set to 1 once a slot is whole.

    Where the fast twin takes addresses, this takes the rows themselves.
    """
    n = int(count)
    raw, places = rows[records[:n].long()], slots[:n].long()
    filled = target[places]
    for run in layout.runs:
        into_planes(raw[:, run.source : run.source + run.nbytes], run.format, run.planes, filled)
    target[places] = filled
    if landed is not None:
        landed[places] = 1
