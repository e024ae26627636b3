"""offmoe: chat with a mixture-of-experts model that does not fit in your GPU's memory.

import offmoe

with offmoe.load("demo", vram="50%") as engine:
    for piece in engine.generate("Why is the sky blue?"):
        print(piece.text, end="", flush=True)
    print(engine.stats().hit_rate)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from offmoe.errors import ContextFull, OffmoeError

if TYPE_CHECKING:
    from offmoe.engine import Engine

# Before torch loads OpenMP: its threads spin at every barrier, and one other busy core then costs a decoded token
# 13 × its time (2 cores: 22 tok/s waiting passively, 1.7 spinning).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["ContextFull", "OffmoeError", "__version__", "load"]
__version__ = "0.1.0"


def load(model: str = "demo", **settings: Any) -> Engine:
    """Open `model` (directory, .gguf, Hugging Face name, or "demo") and place its experts.

    settings: the fields of `offmoe.settings.Settings`, by name. Raises OffmoeError.
    """
    from offmoe.engine import Engine  # imports torch, which takes a second: not for --help

    return Engine.load(model, **settings)
