"""What tests of quantised safetensors share: `path` is one with its published config and tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import decoded, engine_of

from offmoe.errors import OffmoeError
from offmoe.models.model import open_model


def check_answers(path: Path, ids: list[int], want: torch.Tensor, fits: Callable[[set[str]], bool]) -> None:
    """Logits are `want` [T, V], and greedy tokens the same, all in slots and out of a RAM tier of so few rows that
    records are read again; `fits` the formats of all records."""
    answers = []
    for vram, ram in (("100%", "64MiB"), ("51%", 0)):
        with engine_of(path, chunk=5, vram=vram, ram=ram) as engine:
            assert fits({part.format for layout in engine.model.layouts for part in layout.parts})
            logits, _ = decoded(engine, ids, prompt=8)
            engine.reset()
            list(engine.generate(ids[:8], temperature=0.0, max_tokens=24))
            answers.append(engine.answer_tokens)
        assert (logits - want[7:]).abs().max() < 1e-4
    assert answers[0] == answers[1]


def check_config_refused(path: Path, values: dict[str, Any], message: str) -> None:
    """Such a quantization_config is, before any weight is read."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= values
    (path / "config.json").write_text(json.dumps(config))
    check_refused(path, message)


def check_tensors_refused(path: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")
    check_refused(path, message)


def check_refused(path: Path, message: str) -> None:
    with pytest.raises(OffmoeError, match=message):
        open_model(path)
