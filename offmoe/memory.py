"""Host memory, to the byte: for the RAM tier, and on the CPU for the KV cache."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.settings import format_size


def host_memory(nbytes: int) -> Tensor:
    """Zeroed bytes [nbytes] that take no memory before they are touched."""
    try:
        return torch.from_numpy(np.frombuffer(mmap.mmap(-1, nbytes), np.uint8))
    except OSError:
        raise OffmoeError(f"the machine refuses {format_size(nbytes)} of memory: lower --ram or --ctx") from None


def register(tensor: Tensor) -> None:
    """Page-lock host memory for the GPU's copy engine, to the byte: torch's own allocator takes powers of two."""
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(status) != 0:
        raise OffmoeError(
            f"CUDA could not pin {format_size(tensor.nbytes)} of memory (error {int(status)}): lower --ram; "
            "`offmoe doctor` shows the limit"
        )


def unregister(tensor: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
