"""A linear map learned from recorded states, which takes a layer's router's place: `offmoe trace fit` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.policies.base import File, Setting
from offmoe.cache.predictors.base import LIMITS
from offmoe.cache.predictors.gate import Scored
from offmoe.cache.trace import BROKEN, Trace


class Linear(Scored):
    """logits of layer l = states of layer l - ahead · weights[l] + bias[l]; `ahead` is the file's."""

    parameters: ClassVar[Mapping[str, Setting]] = {
        "map": File(),
        **{key: limit for key, limit in LIMITS.items() if key != "d"},
    }

    def __init__(self, trace: Trace, name: str, map: str = "", **values: Any) -> None:
        if not map:
            raise ValueError(f"{name!r} needs a map: write linear:map=FILE.npz, which `offmoe trace fit` makes")
        self.weights, self.bias, ahead = read_map(map)
        super().__init__(trace, name, d=ahead, **values)
        assert trace.states is not None
        layers, hidden = trace.states.shape[1:]
        found, expected = self.weights.shape, (layers, hidden, trace.meta["experts"])
        if found != expected:
            raise ValueError(f"{map} maps {list(found)} and the trace is of {list(expected)}: fit it to this model")

    def logits(self, layer: int) -> NDArray[np.float32]:
        return self.before(layer) @ self.weights[layer].astype(np.float32) + self.bias[layer]


def read_map(path: str) -> tuple[NDArray[Any], NDArray[Any], int]:
    """weights [layers, H, experts], bias [layers, experts], layers ahead; ValueError for what is no such file."""
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            weights, bias, ahead = file["weights"], file["bias"], int(file["ahead"])
    except (*BROKEN, TypeError) as error:
        raise ValueError(f"{path} is no map: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if weights.ndim != 3 or bias.shape != (len(weights), weights.shape[2]) or not 1 <= ahead <= 4:
        raise ValueError(f"{path} is no map: weights {list(weights.shape)}, bias {list(bias.shape)}, ahead {ahead}")
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
        raise ValueError(f"{path} is no map: it holds NaN or infinity")
    return weights, bias, ahead
