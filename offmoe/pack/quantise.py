"""Weights into the formats that a GGUF can hold."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.formats import GGML, Format
from offmoe.pack import ggml_library

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BY_GGML = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")  # the others by gguf


def packable(name: str) -> Format:
    """The format called `name` on the command line. Raises OffmoeError where it cannot be written here."""
    form = GGML.get(name.upper())
    if form is None:
        known = ", ".join(known.lower() for known in GGML)
        raise OffmoeError(f"format {name!r} is unknown: choose one of {known}")
    if form.name in BY_GGML:
        ggml_library.library(name)
    return form


def quantise(weights: Tensor, form: Format) -> Tensor:
    """float32 [rows, cols], finite, → uint8 [bytes]."""
    if form.name in PLAIN:
        return weights.to(PLAIN[form.name]).contiguous().flatten().view(torch.uint8)
    if form.name in BY_GGML:
        return ggml_library.quantise(weights, form)
    with np.errstate(all="ignore"):  # blocks of zeros and of denormals
        blocks = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType(form.gguf_type))
    return torch.from_numpy(blocks).flatten()
