"""Before any test imports torch or triton: how OpenMP threads wait, and Triton's interpreter where there is no GPU."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import offmoe  # noqa: F401  # sets how OpenMP threads wait
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        import fast_interpreter

        fast_interpreter.patch_once()


@pytest.fixture(scope="module")
def whole_model() -> Iterator[None]:
    """What runs whole models through the interpreter asks for this."""
    with fast_interpreter.overflow_unchecked():
        yield
