"""Vocabularies in files: the parts of a checkpoint that a tokenizer reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offmoe.errors import OffmoeError
from offmoe.text.tokenizer import Tokenizer, load_tokenizer


class Files:
    """The parts of a checkpoint that a tokenizer reads."""

    def __init__(self, path: Path | None = None, **metadata: Any) -> None:
        self.kind = "safetensors" if path else "gguf"
        self.path = path or Path("model.gguf")
        self.metadata = {f"tokenizer.{key}": value for key, value in metadata.items()}

    def json(self, name: str) -> Any:
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None


def load(files: Files) -> Tokenizer:
    return load_tokenizer(files)  # type: ignore[arg-type]


def write(path: Path, name: str, **content: Any) -> None:
    (path / name).write_text(json.dumps(content))


def expect_error(files: Files, message: str) -> None:
    with pytest.raises(OffmoeError, match=message) as error:
        load(files)
    assert "\n" not in str(error.value)
