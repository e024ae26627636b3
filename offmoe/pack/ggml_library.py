"""K-quants and IQ4 through the ggml that llama-cpp-python brings, by ctypes and without importing llama_cpp."""

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
def library(need: str) -> ctypes.CDLL:
    """ggml's base library. Raises OffmoeError, which says that `need` needs it, where it is absent."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = (spec.submodule_search_locations if spec else None) or []
    found = sorted(path for folder in folders for path in (Path(folder) / "lib").glob("*ggml-base.*"))
    if not found:
        raise OffmoeError(f"{need} needs ggml: pip install 'offmoe[llama]'")
    try:
        lib = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise OffmoeError(f"{need} needs ggml, and {found[0]} does not load: {error}") from error
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,  # type, source, destination
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,  # first weight, rows, columns
        ctypes.c_void_p,  # importance of the columns
    )  # fmt: skip
    return lib


def quantise(weights: Tensor, form: Format) -> Tensor:
    """float32 [rows, cols], finite, → uint8 [bytes]. The GIL is released; about 50 MB/s a thread."""
    rows, cols = weights.shape
    weights = weights.contiguous()
    assert weights.dtype == torch.float32, weights.dtype  # ggml would abort the process
    out = torch.empty(form.nbytes(rows, cols), dtype=torch.uint8)
    written = library(form.name.lower()).ggml_quantize_chunk(
        form.gguf_type, weights.data_ptr(), out.data_ptr(), 0, rows, cols, None
    )
    assert written == out.numel(), f"ggml wrote {written} bytes of {form.name}, expected {out.numel()}"
    return out
