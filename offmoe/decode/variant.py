"""The variants of a decode step: each is a CUDA graph of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """Key of a captured graph. The context's length is not part of it: attention reads the length on the device."""

    sampler: str = "greedy"  # or topk, full
    served: bool = False  # missing records may have to be requested from the host
    forced: bool = False  # routing is replayed from a table (benchmarks, and measuring the floor)
    prefetch: bool = False
    emulated: bool = False  # predictions are replayed from a table
