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
# The gguf package quantises the others.
BY_GGML = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
# ggml aborts the process without an importance matrix; of IQ1_M it then leaves 60 % of the weights' RMS as error.
BY_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")


def packable(name: str) -> Format:
    """Return the format with this command-line name. Raises OffmoeError if it is unknown, needs an importance
    matrix, or its library is missing.
    """
    fmt = GGML.get(name.upper())
    if fmt is None:
        known = ", ".join(known.lower() for known in GGML if known not in BY_IMPORTANCE)
        raise OffmoeError(f"format {name!r} is unknown: choose one of {known}")
    if fmt.name in BY_IMPORTANCE:
        raise OffmoeError(
            f"{name} needs an importance matrix, which offmoe does not make: choose iq2_s, iq3_xxs or q2_k, "
            "or quantise with llama.cpp's llama-quantize --imatrix"
        )
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
