"""Quantisation to K-quants, IQ2_S, IQ3 and IQ4 by ggml's shared library, which llama-cpp-python installs; called
through ctypes, without importing llama_cpp.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.formats import Format


@cache
def load_library(purpose: str) -> ctypes.CDLL:
    """Load ggml's base library. Raises OffmoeError, which says that `purpose` needs it, if it is absent."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = (spec.submodule_search_locations if spec else None) or []
    found = sorted(path for folder in folders for path in (Path(folder) / "lib").glob("*ggml-base.*"))
    if not found:
        raise OffmoeError(f"{purpose} needs ggml: install it with pip install 'offmoe[llama]'")
    try:
        lib = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise OffmoeError(f"{purpose} needs ggml, and {found[0]} cannot be loaded: {error}") from error
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = (
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),  # type, source, destination
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),  # first weight, rows, columns
        ctypes.c_void_p,  # importance of the columns
    )
    return lib


def quantise(weights: Tensor, fmt: Format) -> Tensor:
    """Quantise finite float32 [rows, cols] to uint8 [bytes]. Releases the GIL; about 50 MB/s per thread."""
    rows, cols = weights.shape
    weights = weights.contiguous()
    assert weights.dtype == torch.float32, weights.dtype  # ggml would abort the process
    out = torch.empty(fmt.nbytes(rows, cols), dtype=torch.uint8)
    written = load_library(fmt.name.lower()).ggml_quantize_chunk(
        fmt.gguf_type, weights.data_ptr(), out.data_ptr(), 0, rows, cols, None
    )
    assert written == out.numel(), f"ggml wrote {written} bytes of {fmt.name}, expected {out.numel()}"
    return out
