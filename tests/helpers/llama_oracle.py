"""llama.cpp as a reference: in float32 throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def oracle(path: Path) -> Any:
    """llama.cpp in float32 throughout: its KV cache too, and no flash attention."""
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_batch=256,
        logits_all=True,
        flash_attn=False,
        type_k=0,
        type_v=0,
        verbose=False,
    )
