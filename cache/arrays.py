"""Types of the NumPy arrays that policies, traces and the residency table exchange."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Numbers = NDArray[np.integer[Any] | np.floating[Any]]
Flags = NDArray[np.bool_]
SlotIds = NDArray[np.int32]
