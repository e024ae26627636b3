"""What all launches share."""

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
    """Programmatic dependent launch: a kernel starts while the one before it drains. sm_90 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent(pdl: bool) -> dict[str, Any]:
    """Launch arguments of a kernel whose `PDL` is `pdl`."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@contextmanager
def compiled_at_once() -> Iterator[None]:
    """Launches inside do not happen: their kernels are compiled, side by side on all cores. A kernel that does not
    compile says so when it is launched."""
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
