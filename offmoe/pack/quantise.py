"""Quantisation of weights to the formats of GGUF."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.formats import GGML, Format
from offmoe.pack import ggml_library

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BY_GGML = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")  # the gguf package quantises the others


def packable(name: str) -> Format:
    """Return the format with this command-line name. Raises OffmoeError if it is unknown or its library is missing."""
    fmt = GGML.get(name.upper())
    if fmt is None:
        known = ", ".join(known.lower() for known in GGML)
        raise OffmoeError(f"format {name!r} is unknown: choose one of {known}")
    if fmt.name in BY_GGML:
        ggml_library.load_library(name)
    return fmt


def quantise(weights: Tensor, fmt: Format) -> Tensor:
    """Quantise finite float32 [rows, cols] to uint8 [bytes]."""
    if fmt.name in FLOAT_DTYPES:
        return weights.to(FLOAT_DTYPES[fmt.name]).contiguous().flatten().view(torch.uint8)
    if fmt.name in BY_GGML:
        return ggml_library.quantise(weights, fmt)
    with np.errstate(all="ignore"):  # blocks of zeros or denormals
        blocks = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType(fmt.gguf_type))
    return torch.from_numpy(blocks).flatten()
