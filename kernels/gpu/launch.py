"""Launch options that all kernels share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton


@cache
def pdl_supported(device: torch.device) -> bool:
    """Return whether the GPU has programmatic dependent launch (sm_90): a kernel starts while the one before drains."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent(pdl: bool) -> dict[str, Any]:
    """Return the launch arguments of a kernel whose constexpr `PDL` is `pdl`."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@contextmanager
def compiled_at_once() -> Iterator[None]:
    """Compile the kernels that are launched inside, in parallel on all cores, without launching them.

    A kernel that does not compile raises its error when it is launched later.
    """
    run = triton.JITFunction.run

    def compile_only(kernel: triton.JITFunction, *values: Any, warmup: bool, **named: Any) -> Any:
        return run(kernel, *values, warmup=True, **named)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        triton.JITFunction.run = compile_only
        try:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                yield
        finally:
            triton.JITFunction.run = run
