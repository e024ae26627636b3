"""Before any test imports torch or triton: how OpenMP threads wait, and Triton's interpreter where there is no GPU."""

import os

import offmoe  # noqa: F401  # sets how OpenMP threads wait
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
