"""Engines of tiny saved models, and the logits and routing that they decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from reference import spread

from offmoe.engine import Engine
from offmoe.models.model import open_model
from offmoe.settings import Settings

IDS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(7)).tolist()


def engine_of(path: Path, **settings: object) -> Engine:
    return Engine(open_model(path), Settings.of(**{"device": "cpu", "ctx": 64, **settings}))


def decoded(engine: Engine, ids: list[int], prompt: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits after each of ids[prompt - 1:], the rest decoded one by one; and every router's weights [T, E]."""
    routed: list[list[torch.Tensor]] = [[] for _ in range(engine.config.moe_layers)]

    def heard(moe_layer: int, experts: np.ndarray, weights: torch.Tensor) -> None:
        routed[moe_layer].append(spread(torch.from_numpy(experts), weights, engine.config.experts))

    engine.store.routed = heard
    rows = [engine.prefill(ids[:prompt])] + [engine.step(token) for token in ids[prompt:]]
    engine.store.check()
    return torch.stack(rows), [torch.cat(layer) for layer in routed]
