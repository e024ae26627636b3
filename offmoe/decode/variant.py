"""What a captured graph of a decode step is for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """What a captured graph is for; another is captured where one of these changes. The context's length is not one:
    attention divides it on the device."""

    sampler: str = "greedy"  # or topk, full
    served: bool = False  # missing records may have to be asked of the host
    forced: bool = False  # routing out of a table, for benchmarks and the floor
    prefetch: bool = False
    emulated: bool = False  # the predictor out of a table
